"""
The Multi30k experiment: what LLM-to-SLM keeps of an LLM's quality, what it saves of its time, and what matters.

    python -m benchmarks.multi30k --data /path/to/data --runs runs/multi30k --workers 2

`configuration/recipes/multi30k.yaml` says what is trained, and `multi30k_short.yaml` beside it is a part of it, of
about an hour; this script does it, in that order and as many jobs at once as there are workers. A finished job is
skipped and a stopped one continues, so the command is repeated until it ends with the report
(benchmarks/multi30k_report.py). Everything is trained on the training split and chosen on the validation split; a
trained model answers the test split once, into `answers.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from benchmarks.tokenizer import train_tokenizer
from modeling_llm2slm.conversion import export
from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.data.files import atomic_write
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.states.store import is_complete
from modeling_llm2slm.training.distillation import distill
from modeling_llm2slm.training.training import load_recipe, train


ROOT = Path(__file__).parents[1]
EXPERIMENT = ROOT / "configuration" / "recipes" / "multi30k.yaml"
PARTS = ("vocabulary", "max_new_tokens", "distilled", "models", "recipes", "rows")
RUNTIMES = ("ctranslate2", "openvino")  # that a row may run the model of another in, in 8 bits
REFERENCES = {"train": "train.jsonl.gz", "validation": "val.jsonl.gz", "test": "test_2016_flickr.jsonl.gz"}


@dataclass(frozen=True)
class Job:
    """
    Args:
        pair: The language pair.
        name: The folder of what it makes: `tokenizer`, `states`, `distilled` or a row, with its seed if not the first.
        needs: Names of what it is made from.
        row: Of a row, what the experiment says.
        seed: Of its weights and its training.
    """

    pair: str
    name: str
    needs: tuple[str, ...]
    row: dict[str, Any] | None = field(default=None, hash=False)
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.pair}/{self.name}"


class Experiment:
    """
    The experiment of a file, with what it has made so far.

    Args:
        data: The folder that holds the language pairs.
        runs: The folder to make things in.
        file: The experiment.
    """

    def __init__(self, data: Path, runs: Path, file: Path = EXPERIMENT):
        self.data, self.runs, self.file = data, runs, file
        self.settings = load_recipe(file)
        missing = [name for name in PARTS if name not in self.settings]
        if missing:
            raise ValueError(f"{file} is no experiment: it has no {missing[0]}. See {EXPERIMENT}.")
        engine = self.settings["distilled"].get("engine", "ctranslate2")
        if engine != "ctranslate2":
            raise ValueError(
                f"{file}: there is no engine {engine!r}. Take ctranslate2, or none for generate() of transformers."
            )
        self._done: set[str] = set()

    @cached_property
    def jobs(self) -> list[Job]:
        """All jobs, in the order of the file; what several rows need comes right before the first of them."""
        jobs: dict[str, Job] = {}
        for pair, rows in self.settings["rows"].items():
            for name, row in rows.items():
                for seed in range(row.get("seeds", 1)):
                    for job in self._with_needs(Job(pair, f"{name}-{seed}" if seed else name, (), row, seed), rows):
                        jobs.setdefault(job.key, job)
        return list(jobs.values())

    def _with_needs(self, job: Job, rows: dict[str, Any]) -> Iterator[Job]:
        row: dict[str, Any] = job.row or {}
        parts = [part for part in row.get("build", {}).values() if part in rows]
        converted = [row[runtime] for runtime in RUNTIMES if runtime in row]
        needs = [*parts, *(converted or ["tokenizer"])]
        yield Job(job.pair, "tokenizer", ())
        if self.uses_states(row):
            needs.append("states")
            yield Job(job.pair, "states", ("llm",))
        if row.get("answers") == "distilled":
            needs.append("distilled")
            yield Job(job.pair, "distilled", ("llm",))
        yield Job(job.pair, job.name, tuple(needs), row, job.seed)

    def uses_states(self, row: dict[str, Any]) -> bool:
        """Whether a row trains on stored states: all do whose LLM is frozen and is read at its last layer."""
        parts = row.get("build", {})
        return {"llm", "slm"} <= set(parts) and not {"encoder_layer", "freeze_llm"} & set(parts)

    def split(self, pair: str, name: str) -> Path:
        """A file of the data."""
        return self.data / pair / REFERENCES[name]

    def is_done(self, job: Job) -> bool:
        """Whether what a job makes is there. It is asked often, and a store takes a look at all of its files."""
        folder = self.runs / job.pair / job.name
        last = {"tokenizer": "tokenizer.json", "distilled": "train.jsonl"}
        if job.key not in self._done and (
            is_complete(folder) if job.name == "states" else (folder / last.get(job.name, "answers.json")).is_file()
        ):
            self._done.add(job.key)
        return job.key in self._done

    def needed(self, job: Job) -> list[Job]:
        """What a job is made from."""
        return [other for other in self.jobs if other.pair == job.pair and other.name in job.needs]

    def check(self, job: Job) -> None:
        """Raises `ValueError` where a job was begun by other settings."""
        made_by = self._made_by(job)
        if made_by.is_file() and json.loads(made_by.read_text(encoding="utf-8")) != self._settings(job):
            raise ValueError(
                f"{self.runs / job.pair / job.name} was begun by another version of the experiment. Remove it and "
                f"{made_by}, or name another folder with --runs."
            )

    def _made_by(self, job: Job) -> Path:
        return self.runs / job.pair / "made-by" / f"{job.name}.json"

    def _settings(self, job: Job) -> dict[str, Any]:
        """All that decides what a job makes, but the data and the code."""
        row, models = job.row or {}, self.settings["models"]
        names = ["vocabulary", "max_new_tokens", *(["distilled"] if job.name == "distilled" else [])]
        return {
            **{name: self.settings[name] for name in names},
            "row": {name: value for name, value in row.items() if name != "seeds"},
            "seed": job.seed,
            "recipe": self._fields(row) if "recipe" in row else {},
            "models": {part: models[part] for part in row.get("build", {}).values() if part in models},
            "needs": {other.name: self._settings(other) for other in self.needed(job)},
        }

    def _fields(self, row: dict[str, Any]) -> dict[str, Any]:
        recipes = self.settings["recipes"]
        return {**recipes["all"], **recipes[row["recipe"]]}

    def do(self, job: Job) -> None:
        """Does a job."""
        self.check(job)
        folder, made_by = self.runs / job.pair, self._made_by(job)
        made_by.parent.mkdir(parents=True, exist_ok=True)
        write_json(made_by, self._settings(job))
        if job.row is not None:
            self._do_row(job, job.row, folder / job.name)
        elif job.name == "tokenizer":
            texts = load_examples(str(self.split(job.pair, "train")), "source", "target")
            with atomic_write(folder / job.name) as aside:
                tokenizer = train_tokenizer([*texts["prompt"], *texts["target"]], self.settings["vocabulary"])
                tokenizer.save_pretrained(aside)
        elif job.name == "states":
            with tempfile.TemporaryDirectory() as start:
                row = next(row for row in self.settings["rows"][job.pair].values() if self.uses_states(row))
                self._build(job.pair, row).save_pretrained(start)
                data = [self.split(job.pair, name) for name in ("train", "validation")]
                encode(start, data, folder / job.name, "source")
        else:
            self._distill(job.pair, folder / job.name)

    def _distill(self, pair: str, folder: Path) -> None:
        options = {**self.settings["distilled"], "max_new_tokens": self.settings["max_new_tokens"]}
        train, llm, output = self.split(pair, "train"), self.model(pair, "llm"), folder / "train.jsonl"
        column = "target"  # in the place of the references, which are validated on
        folder.mkdir(exist_ok=True)
        if "engine" not in options:
            distill(llm, train, output, "source", column=column, **options)
            return
        del options["engine"]
        model = CTranslate2TextToText(llm, folder / "model", "float32")
        rows = Dataset.from_json(str(train)).map(
            lambda batch: {column: model.generate(batch["source"], **options)},
            batched=True, batch_size=1000, load_from_cache_file=False,
        )  # fmt: skip
        with atomic_write(output) as aside:
            rows.to_json(aside, force_ascii=False)

    def model(self, pair: str, row: str) -> Path:
        """Where the trained model of a row is."""
        return self.runs / pair / row / "model"

    def _build(self, pair: str, row: dict[str, Any], seed: int = 0) -> TextToText:
        arguments, folder = dict(row["build"]), self.runs / pair
        parts = [part for part in ("llm", "slm") if part in arguments]
        for part in parts:
            name = arguments[part]
            if name in self.settings["models"]:
                config = folder / "models" / f"{name}.json"
                config.parent.mkdir(parents=True, exist_ok=True)
                write_json(config, {**self.settings["models"][name], "vocab_size": self.settings["vocabulary"]})
                arguments |= {part: str(config), f"{part}_tokenizer": str(folder / "tokenizer")}
            else:
                arguments[part] = str(self.model(pair, name))
        with tempfile.TemporaryDirectory() as chosen:
            if {"encoder_layers", "decoder_layers"} & set(row):
                whole = TextToText.from_pretrained(arguments[parts[-1]])
                choose_layers(whole.model, row.get("encoder_layers"), row.get("decoder_layers"))
                whole.save_pretrained(chosen)
                arguments[parts[-1]] = chosen
            return build(**arguments, seed=seed)

    def _do_row(self, job: Job, row: dict[str, Any], folder: Path) -> None:
        if "build" in row:
            if not (folder / "start").exists():
                with atomic_write(folder / "start") as aside:
                    self._build(job.pair, row, job.seed).save_pretrained(aside)
            if not (folder / "model" / "training.json").is_file():
                train(self.recipe(job))
        model = self.load(job.pair, job.name, row)
        prompts = load_examples(str(self.split(job.pair, "test")), "source", "target")["prompt"][:]
        options = {"batch_size": 50, "max_new_tokens": self.settings["max_new_tokens"]}
        answers = {str(beams): model.generate(prompts, num_beams=beams, **options) for beams in (1, 4)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "answers.json", answers)

    def recipe(self, job: Job) -> dict[str, Any]:
        """The recipe that a row is trained by."""
        row, folder = job.row or {}, self.runs / job.pair
        recipe = {**self._fields(row), "seed": job.seed}
        recipe["generation"] = {"max_new_tokens": self.settings["max_new_tokens"]}
        recipe |= {"model": str(folder / job.name / "start"), "output_dir": str(folder / job.name / "model")}
        recipe |= {"train_data": str(self.split(job.pair, "train")), "target_column": "target"}
        recipe["validation_data"] = str(self.split(job.pair, "validation"))
        if row.get("answers") == "distilled":
            recipe["train_data"] = str(folder / "distilled" / "train.jsonl")
        if self.uses_states(row):
            recipe["llm_states"] = str(folder / "states")
        return recipe

    def load(self, pair: str, name: str, row: dict[str, Any]) -> Any:
        """The trained model of a row."""
        folder = self.model(pair, name)
        if "ctranslate2" in row:
            return CTranslate2TextToText(self.model(pair, row["ctranslate2"]), folder)
        if "openvino" in row and not folder.exists():
            export(self.model(pair, row["openvino"]), folder, runtime="openvino", weights="int8")
        return TextToText.from_pretrained(folder)


def choose_layers(t5: Any, encoder: list[int] | None = None, decoder: list[int] | None = None) -> None:
    """
    Makes a T5 of some of its layers: fewer to be faster, or each several times as a start for a deeper one (Gong et
    al., 2019). The first layer has the distances for all, so it has to come first.
    """
    for stack, chosen in ((t5.encoder, encoder), (t5.decoder, decoder)):
        if chosen is None:
            continue
        stack.block = nn.ModuleList(copy.deepcopy(stack.block[layer]) for layer in chosen)
        for index, block in enumerate(stack.block):
            for attention in [module for module in block.modules() if isinstance(module, T5Attention)]:
                attention.layer_idx = index
                if index and attention.has_relative_attention_bias:
                    attention.has_relative_attention_bias = False
                    del attention.relative_attention_bias
        stack.config.num_layers = len(chosen)
    t5.config.num_layers = t5.encoder.config.num_layers
    t5.config.num_decoder_layers = t5.decoder.config.num_layers


class CTranslate2TextToText:
    """
    An LLM under CTranslate2, to be scored and timed like a [`TextToText`].

    Args:
        llm: Its checkpoint.
        folder: Where its converted form is, or is written to.
        compute_type: Of its weights and of what it computes.
    """

    def __init__(self, llm: Path, folder: Path, compute_type: str = "int8"):
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoTokenizer

        if not folder.exists():
            with atomic_write(folder) as aside:
                TransformersConverter(str(llm)).convert(str(aside), quantization=compute_type, force=True)
        self.tokenizer = AutoTokenizer.from_pretrained(llm)
        self.translator = ctranslate2.Translator(
            str(folder), device="cpu", intra_threads=torch.get_num_threads(), compute_type=compute_type
        )

    def generate(self, prompts: list[str], batch_size: int = 32, **options: Any) -> list[str]:
        tokens = self.generate_tokens(prompts, batch_size, **options)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def generate_tokens(
        self, prompts: list[str], batch_size: int = 32, num_beams: int = 1, max_new_tokens: int = 64
    ) -> list[list[int]]:
        words = [self.tokenizer.convert_ids_to_tokens(ids) for ids in self.tokenizer(prompts).input_ids]
        found = self.translator.translate_batch(
            words, max_batch_size=batch_size, beam_size=num_beams, max_decoding_length=max_new_tokens
        )
        end = self.tokenizer.eos_token_id
        return [[*self.tokenizer.convert_tokens_to_ids(answer.hypotheses[0]), end] for answer in found]


def run(experiment: Experiment, arguments: argparse.Namespace) -> bool:
    """Does all jobs that are not done, each in a process with a log beside its result; whether all are done."""
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
                break  # what is left waits for what failed, or was not asked for
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
        print(f"{job.key}: not begun, as it needs {', '.join(_missing(experiment, job))}", flush=True)
    return not failed and not waiting


def _missing(experiment: Experiment, job: Job) -> list[str]:
    """What a job needs and what is not done."""
    return [other.key for other in experiment.needed(job) if not experiment.is_done(other)]


def _start(job: Job, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    log = arguments.runs / job.pair / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{job.key}: {log}", flush=True)
    command = [sys.executable, "-m", "benchmarks.multi30k", "--experiment", arguments.experiment]
    command += ["--data", arguments.data, "--runs", arguments.runs, "--threads", arguments.threads]
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # glibc gives memory of this size back and takes it anew at every step: a tenth to a quarter of an SLM's time.
    environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**33))
    with log.open("ab") as file:
        return subprocess.Popen(
            [*map(str, command), "--job", job.key],
            env=os.environ | environment, stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
        )  # fmt: skip


def main() -> None:
    """Runs what has not been run yet, and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("LLM2SLM_DATA", "data"), help="the folder with multi30k")
    parser.add_argument("--experiment", default=EXPERIMENT, type=Path, help="the file that says what is trained")
    parser.add_argument("--runs", default="runs/multi30k", type=Path, help="the folder for all that is made")
    parser.add_argument("--workers", default=2, type=int, help="jobs at once")
    parser.add_argument("--threads", default=1, type=int, help="of each job; more where few jobs are left")
    parser.add_argument("--only", nargs="*", help="do these jobs, such as en-de/t5-add, and report nothing")
    parser.add_argument("--report", action="store_true", help="report what there is, and do nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.workers, arguments.threads) < 1:
        parser.error("--workers and --threads are at least 1")
    arguments.runs, arguments.data = arguments.runs.absolute(), Path(arguments.data).absolute()
    data = arguments.data / "multi30k"
    if not data.is_dir():
        raise SystemExit(f"There is no folder {data}. Name the one that holds it with --data or LLM2SLM_DATA.")
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
            raise SystemExit(f"There is no job {key}; there are {', '.join(keys)}.")
    torch.set_num_threads(arguments.threads if arguments.job else 1)  # reported times are of one
    for stop in (signal.SIGTERM, signal.SIGHUP):  # the terminal that is closed stops the jobs as well
        signal.signal(stop, lambda *_: sys.exit("stopped"))
    if arguments.job:
        experiment.do(keys[arguments.job])
    elif not arguments.report and not run(experiment, arguments):
        raise SystemExit(1)
    elif arguments.report or not arguments.only:
        from benchmarks.multi30k_report import report

        report(experiment)


if __name__ == "__main__":
    main()
