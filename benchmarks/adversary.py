"""
Kill the commands, fill their disks, forbid writing, damage their files and checkpoints, and run them twice at once.

    OMP_NUM_THREADS=1 python -m benchmarks.adversary --output docs/results/adversary.json

Each trial ends well, or with one sentence and status 1; nothing that existed is lost, nothing hangs, and a run that
resumes gives the output of an uninterrupted one. What did not hold is listed under "faults", and the status is 1 then.
Full and read-only disks are mounted, which takes root: they are left out otherwise. A process is forked for each
command, after the imports, so a trial takes about a second. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import deserialize

import llm2slm
from modeling_llm2slm.data.loading import load_prompts
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import DataSettings
from modeling_llm2slm.states.store import StateStore


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo"
SECONDS = 120  # until a command counts as hung
PROMPTS = 40


@dataclass
class Command:
    """
    A command of the trials.

    Args:
        words: Its words; `{out}` stands for the output.
        output: Name of the output.
        content: Returns what must be equal in two outputs.
    """

    words: list[str]
    output: str
    content: Callable[[Path], Any] = lambda path: path.read_bytes()
    reference: Any = field(default=None, init=False)
    seconds: float = field(default=0.0, init=False)

    def at(self, place: Path) -> list[str]:
        """Return the words for an output in this folder."""
        return [word.replace("{out}", str(place / self.output)) for word in self.words]


@dataclass
class Run:
    """The end of a command: its status, negative for a signal, and what it printed."""

    status: int
    printed: str

    def fault(self, *expected: int) -> str | None:
        """Return what is wrong with this end, or `None`."""
        lines = [line for line in self.printed.splitlines() if line.startswith("Error: ")]
        if self.status not in expected:
            return f"status {self.status}: {self.printed[-300:]}"
        if "Traceback" in self.printed or (self.status == 1 and len(lines) != 1):
            return f"no single sentence: {self.printed[-300:]}"
        return None


class Process:
    """A command in a forked process."""

    def __init__(self, words: list[str]):
        self._printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - read after the process ended
        self.number = os.fork()
        if self.number == 0:
            self._be(words)
        self._start = time.monotonic()

    def _be(self, words: list[str]) -> None:
        status = 70
        try:
            os.setpgid(0, 0)
            for stream in (1, 2):
                os.dup2(self._printed.fileno(), stream)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - until the process ends
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - until the process ends
            llm2slm.main(words)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def kill(self) -> None:
        """Kill the process as `kill -9` does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)

    def wait(self) -> Run:
        """Wait for the end; a process that takes too long is killed."""
        while True:
            number, status = os.waitpid(self.number, os.WNOHANG)
            if number:
                break
            if time.monotonic() - self._start > SECONDS:
                self.kill()
            time.sleep(0.005)
        self._printed.seek(0)
        return Run(os.waitstatus_to_exitcode(status), self._printed.read())


def run(words: list[str]) -> Run:
    """Run a command to its end."""
    return Process(words).wait()


class Adversary:
    """
    The trials, in a folder.

    Args:
        folder: The folder.
        seed: Seed of all moments, sizes and damages.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        self.faults: list[str] = []
        self.commands = self._commands()
        for name, command in self.commands.items():
            place = folder / "reference" / name
            place.mkdir(parents=True)
            start = time.monotonic()
            ended = run(command.at(place))
            command.seconds = time.monotonic() - start
            if ended.status:
                raise RuntimeError(f"{name} fails: {ended.printed}")
            command.reference = command.content(place / command.output)
            print(f"{name}: {command.seconds:.1f} s", flush=True)

    def _commands(self) -> dict[str, Command]:
        base = self.folder / "base"
        # Not in this process: torch may not compute before it is forked.
        built = run(["build", str(base / "model"), "--llm", str(DEMO / "llm"), "--slm", str(DEMO / "gpt2.json")])
        if built.status:
            raise RuntimeError(f"build fails: {built.printed}")
        with gzip.open(DEMO / "data" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:PROMPTS]
        columns = [name for name, value in rows[0].items() if isinstance(value, str)]
        rows = [{"prompt": row[columns[0]], "target": row[columns[1]]} for row in rows]
        (base / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        recipe = {
            "model": str(base / "model"), "train_data": str(base / "rows.jsonl"), "max_steps": 6, "save_steps": 1,
            "save_strategy": "steps", "per_device_train_batch_size": 4, "prompt_max_length": 32,
            "target_max_length": 32, "save_total_limit": 2,
        }  # fmt: skip
        (base / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        model, data = str(base / "model"), str(base / "rows.jsonl")
        short = ["--max-new-tokens", "4", "--batch-size", "2"]
        return {
            "convert": Command(["convert", "split", model, "{out}"], "parts", _weights),
            "distill": Command(
                ["distill", str(DEMO / "llm"), data, "--output", "{out}", "--num-beams", "1", *short], "out.jsonl"
            ),
            "encode": Command(["encode", model, data, "--output", "{out}", "--batch-size", "2"], "states", _states),
            "generate": Command(["generate", model, "--file", data, "--output", "{out}", *short], "out.txt"),
            "train": Command(["train", str(base / "recipe.yaml"), "--output-dir", "{out}"], "run", _weights),
        }

    def place(self) -> Path:
        """Return a new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def check(self, what: str, fault: str | None) -> bool:
        """Note a fault; return whether there is none."""
        if fault is not None:
            self.faults.append(f"{what}: {fault}")
            print(f"fault  {self.faults[-1]}", flush=True)
        return fault is None

    def check_result(self, what: str, command: Command, place: Path) -> bool:
        """Check that an output equals that of an uninterrupted run, and that nothing else was left."""
        try:
            found = command.content(place / command.output)
        except Exception as error:  # whatever a damaged output raises
            return self.check(what, f"the output cannot be read: {error!r}")
        left = [path.name for path in place.rglob(".*")] + [path.name for path in place.glob("*.part*")]
        return self.check(what, None if found == command.reference else "another output") and self.check(
            what, f"left behind: {left}" if left else None
        )

    def kills(self, count: int) -> dict[str, Any]:
        """Kill each command at random moments, and repeat it."""
        counts: dict[str, Any] = {}
        for name, command in self.commands.items():
            equal = killed = 0
            for _ in range(count):
                place, moment = self.place(), self.random.uniform(0, command.seconds)
                process, what = Process(command.at(place)), f"{name} killed after {moment:.2f} s"
                time.sleep(moment)
                process.kill()
                killed += process.wait().status < 0
                finished = (place / command.output).exists() and name in ("convert", "distill", "generate")
                ended = None if finished else run(command.at(place))
                if ended is None or self.check(what, ended.fault(0)):
                    equal += self.check_result(what, command, place)
                shutil.rmtree(place)
            counts[name] = {"runs": count, "killed": killed, "equal afterwards": equal}
        return counts

    def full_disks(self, count: int) -> dict[str, int]:
        """Run commands on small disks; then enlarge the disk, and repeat the command."""
        counts: Counter[str] = Counter()
        for trial, (name, command) in zip(range(count), self._in_turns(), strict=False):
            size = sum(file.stat().st_size for file in self._reference_files(name, command))
            with mounted(self.place(), f"size={self.random.randint(4, max(2 * size // 1024, 8))}k") as disk:
                what, ended = f"{name} on full disk {trial}", run(command.at(disk))
                if self.check(what, ended.fault(0, 1)):
                    counts["fitted" if ended.status == 0 else "one sentence"] += 1
                if ended.status:
                    mount("-o", "remount,size=1g", str(disk))
                    if self.check(what, run(command.at(disk)).fault(0)):
                        counts["equal afterwards"] += self.check_result(what, command, disk)
        return {"runs": count, **counts}

    def read_only(self, count: int) -> dict[str, int]:
        """Run commands on disks that are read-only, which hold nothing or an earlier output."""
        counts: Counter[str] = Counter()
        for trial, (name, command) in zip(range(count), self._in_turns(), strict=False):
            with mounted(self.place(), "size=1g") as disk:
                if trial % 2:
                    (disk / command.output).mkdir()
                before = sorted(disk.rglob("*"))
                mount("-o", "remount,ro", str(disk))
                what, ended = f"{name} on read-only disk {trial}", run(command.at(disk))
                if self.check(what, ended.fault(1)):
                    counts["one sentence"] += 1
                self.check(what, None if sorted(disk.rglob("*")) == before else "the disk has changed")
        return {"runs": count, **counts}

    def _in_turns(self) -> Iterator[tuple[str, Command]]:
        while True:
            yield from self.commands.items()

    def _reference_files(self, name: str, command: Command) -> list[Path]:
        output = self.folder / "reference" / name / command.output
        return [path for path in (output, *output.rglob("*")) if path.is_file()]

    def data(self, count: int) -> dict[str, int]:
        """Damage data files of every format."""
        counts: Counter[str] = Counter()
        sources = self._data_files()
        damage = import_module("tests.support.fuzzing").spoil_bytes
        for trial in range(count):
            suffix = self.random.choice(list(sources))
            file = self.folder / f"damaged{suffix}"
            file.write_bytes(damage(sources[suffix], self.random))
            settings = DataSettings(skip_bad_rows=trial % 2 == 0)
            counts[self._outcome(f"data {trial} ({suffix})", str(file), load_prompts, file, settings)] += 1
        return {"files": count, **counts}

    def _data_files(self) -> dict[str, bytes]:
        from datasets import Dataset

        text = (self.folder / "base" / "rows.jsonl").read_text(encoding="utf-8")
        rows = Dataset.from_list([json.loads(line) for line in text.splitlines()])
        base = self.folder / "base"
        rows.to_csv(base / "rows.csv", index=False)
        rows.to_csv(base / "rows.tsv", sep="\t", index=False)
        rows.to_parquet(base / "rows.parquet")
        files = {suffix: (base / f"rows{suffix}").read_bytes() for suffix in (".jsonl", ".csv", ".tsv", ".parquet")}
        files[".json"] = json.dumps(rows.to_list()).encode()
        files[".txt"] = "".join(f"{row['prompt']}\n" for row in rows).encode()
        files[".jsonl.gz"] = gzip.compress(files[".jsonl"])
        return files

    def checkpoints(self, count: int) -> dict[str, int]:
        """Damage checkpoints, and generate with them."""
        counts: Counter[str] = Counter()
        damage = import_module("tests.support.fuzzing").spoilt

        def generate(path: Path) -> None:
            TextToText.from_pretrained(path).generate(["Hello"], max_new_tokens=2)

        for trial in range(count):
            path = damage(self.folder / "base" / "model", self.folder / "damaged", self.random.randrange(10**9))
            counts[self._outcome(f"checkpoint {trial}", "", generate, path)] += 1
        return {"checkpoints": count, **counts}

    def _outcome(self, what: str, named: str, act: Callable[..., Any], *arguments: Any) -> str:
        """Return how a call in this process ended; anything but a result or one sentence is a fault."""

        def hang(*_: Any) -> None:
            raise TimeoutError("it hangs")

        previous = signal.signal(signal.SIGALRM, hang)
        signal.alarm(SECONDS)
        try:
            act(*arguments)
        except TimeoutError as error:
            self.check(what, str(error))
            return "hung"
        except (OSError, ValueError) as error:
            self.check(what, None if named in str(error) else f"does not name the file: {error}")
            return "one sentence"
        except Exception as error:
            self.check(what, repr(error))
            return "another exception"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        return "read"

    def twice(self) -> dict[str, int]:
        """Start each command while another one writes to the same place."""
        counts: Counter[str] = Counter()
        for name, command in self.commands.items():
            place, what = self.place(), f"{name} twice"
            first = Process(command.at(place))
            lock, start = place / f".{command.output}.lock", time.monotonic()
            while not lock.exists() and time.monotonic() - start < SECONDS:
                time.sleep(0.001)
            os.kill(first.number, signal.SIGSTOP)  # it may be fast
            second = run(command.at(place))
            os.kill(first.number, signal.SIGCONT)
            # The first may be stopped before it holds its lock: then it is the one that is refused.
            outcomes = sorted((first.wait(), second), key=lambda one: "is being written by another run" in one.printed)
            refused = "is being written by another run" in outcomes[1].printed
            counts["one refused"] += self.check(what, outcomes[1].fault(1) or (None if refused else second.printed))
            counts["other unharmed"] += self.check(what, outcomes[0].fault(0)) and self.check_result(
                what, command, place
            )
        return {"runs": len(self.commands), **counts}


def _weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in _final(folder)}


def _final(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(file)]


def _states(folder: Path) -> list[bytes]:
    """Return each key with its hidden states, in an order that does not depend on the shards."""
    rows: list[bytes] = []
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {name: bytes(tensor["data"]) for name, tensor in deserialize(file.read_bytes())}
        keys, lengths = (np.frombuffer(tensors["keys"], "S32"), np.frombuffer(tensors["lengths"], "<i8"))
        width = len(tensors["states"]) // int(lengths.sum())
        ends = np.cumsum(lengths) * width
        rows += [
            bytes(key) + tensors["states"][end - length * width : end]
            for key, length, end in zip(keys, lengths, ends, strict=True)
        ]
    assert len(rows) == len(StateStore(folder))
    return sorted(rows)


def mount(*words: str) -> None:
    """Call `mount`."""
    subprocess.run(["mount", *words], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount an empty disk in memory."""
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Return whether this process may mount disks."""
    folder.mkdir()
    try:
        with mounted(folder, "size=4k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills of each command")
    parser.add_argument("--disks", type=int, default=60, help="full disks")
    parser.add_argument("--read-only", type=int, default=40, help="read-only disks")
    parser.add_argument("--data", type=int, default=1000, help="damaged data files")
    parser.add_argument("--checkpoints", type=int, default=300, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_module("llm2slm.loading").quiet_libraries(data=True)
    with tempfile.TemporaryDirectory() as folder:
        adversary = Adversary(Path(folder), args.seed)
        result: dict[str, Any] = {
            "seed": args.seed,
            "two runs": adversary.twice(),
            "kills": adversary.kills(args.kills),
        }
        if can_mount(Path(folder, "disk")):
            result |= {
                "full disks": adversary.full_disks(args.disks),
                "read-only": adversary.read_only(args.read_only),
            }
        result |= {"data": adversary.data(args.data), "checkpoints": adversary.checkpoints(args.checkpoints)}
    result["faults"] = adversary.faults
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)
    sys.exit(bool(adversary.faults))


if __name__ == "__main__":
    main()
