"""
Run the Multi30k experiment: how much of an LLM's quality LLM-to-SLM keeps, how much time it saves, and what matters.

    python -m benchmarks.multi30k --data /path/to/data --runs runs/multi30k --workers 2

`configuration/recipes/multi30k.yaml` describes what is trained; `multi30k_short.yaml` is a part of it that takes about
an hour. Finished jobs are skipped and stopped ones resume: repeat the command until it ends with the report.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.multi30k_experiment import EXPERIMENT, ROOT, Experiment, Job
from benchmarks.multi30k_report import report


def run(experiment: Experiment, arguments: argparse.Namespace) -> bool:
    """Do the jobs that are not done, each in a process with its own log; return whether all are done then."""
    waiting = [job for job in experiment.jobs if not experiment.is_done(job)]
    if arguments.only:
        waiting = [job for job in waiting if job.key in arguments.only]
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    count, failed = len(waiting), []
    try:
        while waiting or running:
            for job in [job for job in waiting if not _missing(experiment, job)]:
                if len(running) < arguments.workers:
                    waiting.remove(job)
                    running[job] = _start(job, arguments), time.time()
            if not running:
                break  # the remaining jobs need one that failed or was not requested
            time.sleep(1)
            for job, (process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    failed += [job.key] if process.returncode else []
                    outcome = "FAILED, see its log" if process.returncode else "done"
                    minutes, left = (time.time() - start) / 60, len(waiting) + len(running)
                    print(f"{job.key}: {outcome} after {minutes:.1f} min; {left} of {count} to do", flush=True)
    finally:
        for process, _ in running.values():
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    for job in waiting:
        print(f"{job.key}: not started, because it needs {', '.join(_missing(experiment, job))}", flush=True)
    return not failed and not waiting


def _missing(experiment: Experiment, job: Job) -> list[str]:
    """Return the jobs that a job needs and that are not done."""
    return [other.key for other in experiment.needed(job) if not experiment.is_done(other)]


def _start(job: Job, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    log = arguments.runs / job.pair / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{job.key}: {log}", flush=True)
    command = [sys.executable, "-m", "benchmarks.multi30k", "--experiment", arguments.experiment]
    command += ["--data", arguments.data, "--runs", arguments.runs, "--threads", arguments.threads]
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # By default, glibc returns large blocks and requests them again at every step: 10 to 25 % of an SLM's time.
    environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**33))
    with log.open("ab") as file:
        return subprocess.Popen(
            [*map(str, command), "--job", job.key],
            env=os.environ | environment, stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
        )  # fmt: skip


def main() -> None:
    """Run the jobs that are not done, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("LLM2SLM_DATA", "data"), help="folder that contains multi30k")
    parser.add_argument("--experiment", default=EXPERIMENT, type=Path, help="file that describes the experiment")
    parser.add_argument("--runs", default="runs/multi30k", type=Path, help="folder of the results")
    parser.add_argument("--workers", default=2, type=int, help="number of jobs at a time")
    parser.add_argument("--threads", default=1, type=int, help="threads of each job")
    parser.add_argument("--only", nargs="*", help="do only these jobs, such as en-de/t5-add, without a report")
    parser.add_argument("--report", action="store_true", help="report the jobs that are done, and do none")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.workers, arguments.threads) < 1:
        parser.error("--workers and --threads must be at least 1")
    arguments.runs, arguments.data = arguments.runs.absolute(), Path(arguments.data).absolute()
    data = arguments.data / "multi30k"
    if not data.is_dir():
        raise SystemExit(f"There is no folder {data}. Name its parent folder with --data or LLM2SLM_DATA.")
    arguments.experiment = arguments.experiment.absolute()
    try:
        experiment = Experiment(data, arguments.runs, arguments.experiment)
        for job in experiment.jobs:
            experiment.check(job)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    keys = {job.key: job for job in experiment.jobs}
    for key in (*(arguments.only or ()), *filter(None, [arguments.job])):
        if key not in keys:
            raise SystemExit(f"Unknown job {key}. The jobs are: {', '.join(keys)}.")
    torch.set_num_threads(arguments.threads if arguments.job else 1)  # times are reported for one thread
    for stop in (signal.SIGTERM, signal.SIGHUP):  # closing the terminal stops the jobs too
        signal.signal(stop, lambda *_: sys.exit("stopped"))
    if arguments.job:
        experiment.do(keys[arguments.job])
    elif not arguments.report and not run(experiment, arguments):
        raise SystemExit(1)
    elif arguments.report or not arguments.only:
        report(experiment)


if __name__ == "__main__":
    main()
