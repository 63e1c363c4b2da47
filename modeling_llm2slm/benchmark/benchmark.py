"""How fast LLM, SLM and LLM-to-SLM answer, on every runtime, in one run and by turns, and what the limit is."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from ..configuration_llm2slm import LLM2SLMConfig
from ..data.files import atomic_write
from ..data.records import versions, write_json
from ..engines.graphs import graph_size, is_exported
from ..files_llm2slm import first_line, weight_files
from ..inference.text_to_text import decoding_modules
from ..states.fingerprints import checkpoint_fingerprint
from ..training.memory import make_fake, without_storage
from .contestants import (
    CONTESTANTS,
    Answer,
    Cell,
    Models,
    Timing,
    load_composite,
    make_models,
    time_generation,
)


MAX_CELLS = 40
BUSY = 0.15  # processors that others may keep busy before a cell counts as disturbed
PACKAGES = ("ctranslate2", "nncf", "onnxruntime", "openvino")
Progress = Callable[[str], None]


def load_sweep(path: str | Path) -> list[Cell]:
    """
    The cells of a YAML file: a list `cells` of mappings with the fields of [`Cell`].

    Raises:
        ValueError: If the file is no such list, is longer than 40 cells, or a cell has an unknown field.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["cells"]
        cells = [Cell(**row | {"contestants": tuple(row.get("contestants", ()))}) for row in rows]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a sweep: {' '.join(str(error).split())}") from error
    if len(cells) > MAX_CELLS:
        raise ValueError(f"{path} has {len(cells)} cells; {MAX_CELLS} are the most.")
    return cells


class Benchmark:
    """
    A run over cells, each kept in the output as soon as it is measured; cells that are there are not measured again.

    Args:
        cells: What to answer.
        output: The JSON file.
        work: A folder for models with random weights and their exports, which are large and kept.
        models: Given checkpoints, for cells without a preset; what is made of them gets a folder of its own in theirs.
        device: Where to compute: `cpu` in float32, elsewhere in bfloat16.
        threads: Of every contestant.
        progress: Called with a few words at every step.

    Raises:
        ValueError: If the output is of another machine, device or checkpoint, or a cell names what does not exist.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        output: Path,
        work: Path,
        models: Models | None = None,
        device: str = "cpu",
        threads: int = 1,
        progress: Progress = lambda step: None,
    ):
        self.cells = cells
        self.output = output
        self.work = work
        self.given = models
        self.device = device
        self.threads = threads
        self.progress = progress
        for cell in cells:
            if unknown := set(cell.contestants) - set(CONTESTANTS):
                raise ValueError(f"There is no contestant {unknown.pop()!r}; there are {', '.join(CONTESTANTS)}.")
        self.result = self._begin()

    def _begin(self) -> dict[str, Any]:
        setting: dict[str, Any] = {"device": _device_name(self.device), "threads": self.threads}
        setting["versions"] = _versions()
        if self.given is not None and not all(cell.preset for cell in self.cells):
            prints = {name: _fingerprint(getattr(self.given, name)) for name in ("llm", "llm2slm")}
            setting["given"] = prints
            folder = "-".join(digest[:8] for digest in prints.values())
            self.given = replace(self.given, folder=self.given.folder / folder)
        if not self.output.is_file():
            return {"setting": setting, "contestants": {}, "cells": {}}
        try:
            result = json.loads(self.output.read_text(encoding="utf-8"))
            found = result["setting"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.output} is no result of a benchmark. Name another file, or remove it.") from error
        if found != setting:
            raise ValueError(
                f"{self.output} was measured in another setting: with other checkpoints, versions or threads, or on "
                "another device. Name another file, or remove it."
            )
        return result

    def run(self) -> dict[str, Any]:
        """Measures what is not there yet, and returns everything."""
        torch.set_num_threads(self.threads)
        for preset in dict.fromkeys(cell.preset for cell in self.cells):
            cells = [cell for cell in self.cells if cell.preset == preset]
            if all(cell.key in self.result["cells"] for cell in cells):
                continue
            models = self._models(preset)
            costs = self.result["contestants"].setdefault(preset or "given", {})
            for name in dict.fromkeys(name for cell in cells for name in _names(cell)):
                if name not in costs:
                    self.progress(f"{preset}: loading {name}")
                    costs[name] = self._cost(name, models)
                    self._keep()
            self._measure_all(cells, models)
        return self.result

    def _models(self, preset: str) -> Models:
        if not preset:
            if self.given is None:
                raise ValueError("A cell names no preset: give the checkpoints to compare.")
            return self.given
        self.progress(f"{preset}: making models of its sizes")
        return make_models(preset, self.work / preset)

    def _cost(self, name: str, models: Models) -> dict[str, float]:
        """Makes a contestant if need be, and loads it in a process of its own, for its time and memory."""
        contestant, made = CONTESTANTS[name], models.folder / name
        if contestant.make is not None and not made.exists():
            self.progress(f"making {name}")
            with atomic_write(made) as folder:
                contestant.make(models, folder)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_load_apart, name, models, self.device, self.threads).result()

    def _measure_all(self, cells: list[Cell], models: Models) -> None:
        flops = _Flops(models)
        stages = Stages(models, self.device)
        answers: dict[str, Answer] = {}
        for cell in cells:
            if cell.key in self.result["cells"]:
                continue
            names = _names(cell)
            for name in names:
                if name not in answers:
                    answers[name] = CONTESTANTS[name].load(models, self.device, self.threads)
            self.result["cells"][cell.key] = self._measure(
                cell, {name: answers[name] for name in names}, stages, flops
            )
            self._keep()

    def _measure(self, cell: Cell, answers: Mapping[str, Answer], stages: Stages, flops: _Flops) -> dict[str, Any]:
        timings: dict[str, list[Timing]] = {name: [] for name in answers}
        parts: list[dict[str, float]] = []
        for name, answer in answers.items():
            self.progress(f"{cell.key}: warming up {name}")
            answer(replace(cell, answer=min(cell.answer, 8)))
        bandwidth = _bandwidth(stages.decode_bytes, self.device)
        with _disturbance() as disturbance:
            for turn in range(cell.repeats):
                order = list(answers)[turn % len(answers) :] + list(answers)[: turn % len(answers)]
                for name in order:
                    self.progress(f"{cell.key}: round {turn + 1} of {cell.repeats}, {name}")
                    timings[name].append(answers[name](cell))
                if "llm2slm" in answers:
                    parts.append(stages(cell))
        rows = {name: _row(cell, times) for name, times in timings.items()}
        for name, row in rows.items():
            contestant = CONTESTANTS[name]
            if contestant.small:
                size, made = stages.decode_bytes * contestant.bits // 32, stages.models.folder / name
                if is_exported(made):
                    size = graph_size(made, "step")
                row["floor_ms_per_token"] = 1000 * size / bandwidth
        return {
            **{key: value for key, value in asdict(cell).items() if key != "contestants"},
            "results": rows,
            "stages_ms": {name: 1000 * statistics.median(part[name] for part in parts) for name in parts[0]}
            if parts
            else {},
            "llm_flops_by_llm2slm_flops": flops.ratio(cell),
            "gigabytes_per_second": bandwidth / 1e9,
            **disturbance,
        }

    def _keep(self) -> None:
        write_json(self.output, self.result)


class Stages:
    """The parts of an answer of the composite, eager: the LLM, the projector (and the SLM's encoder), the prefill."""

    def __init__(self, models: Models, device: str):
        self.models = models
        self.model: Any = load_composite(models, device)
        weights = {weight for part in decoding_modules(self.model.decoder) for weight in part.parameters()}
        self.decode_bytes = sum(weight.nbytes for weight in weights)

    def __call__(self, cell: Cell) -> dict[str, float]:
        ids = cell.ids(self.model.config.encoder.vocab_size).to(self.model.device)
        mask, seconds = torch.ones_like(ids), {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            value = work()
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
            return value

        states = timed("LLM", lambda: self.model.encode_llm(ids, mask))
        prompt = timed("projector", lambda: self.model.encode_prompt(ids, mask, llm_hidden_states=states))
        timed("first token", lambda: time_generation(self.model, replace(cell, answer=1), {"encoder_outputs": prompt}))
        if cell.beams > 1:
            greedy = replace(cell, answer=1, beams=1)
            timed("first token, greedy", lambda: time_generation(self.model, greedy, {"encoder_outputs": prompt}))
        return seconds


class _Flops:
    """Floating-point operations of an answer, counted by torch on models without storage."""

    def __init__(self, models: Models):
        self.composite = without_storage(LLM2SLMConfig.from_pretrained(models.llm2slm))
        with torch.device("meta"):
            self.llm = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(models.llm))
        self.fake = FakeTensorMode()  # on the meta device alone, masks are looked into
        for model in (self.llm, self.composite):
            make_fake(model, self.fake)

    def ratio(self, cell: Cell) -> float:
        """The LLM's by the composite's, whatever the batch."""
        counts = []
        for model in (self.llm, self.composite):
            with FlopCounterMode(display=False) as counter, self.fake, torch.no_grad():
                ids, labels = (torch.zeros(1, length, dtype=torch.long) for length in (cell.prompt, cell.answer))
                model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
            counts.append(counter.get_total_flops())
        return counts[0] / counts[1]


def _names(cell: Cell) -> tuple[str, ...]:
    return cell.contestants or tuple(name for name, contestant in CONTESTANTS.items() if contestant.can_run)


def _row(cell: Cell, timings: Sequence[Timing]) -> dict[str, Any]:
    seconds = [timing.total for timing in timings]
    return {
        "seconds": statistics.median(seconds),
        "first_token_ms": 1000 * statistics.median(timing.first for timing in timings),
        "ms_per_token": 1000 * statistics.median(timing.token for timing in timings),
        "tokens_per_second": cell.batch * cell.answer / statistics.median(seconds),
        "rounds": [asdict(timing) for timing in timings],
    }


def _load_apart(name: str, models: Models, device: str, threads: int) -> dict[str, float]:
    """Seconds of a load, and bytes of memory that it and a short answer take beyond what the imports took."""
    torch.set_num_threads(threads)
    before = _peak_memory()
    start = time.perf_counter()
    answer = CONTESTANTS[name].load(models, device, threads)
    seconds = time.perf_counter() - start
    answer(Cell(prompt=64, answer=4))
    return {"load_seconds": seconds, "peak_bytes": _peak_memory() - before}


def _peak_memory() -> int:
    """Bytes that this process has held at most, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # elsewhere the peak of the process that started this one counts as well
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _bandwidth(size: int, device: str) -> float:
    """Bytes per second at which a buffer of a size is read: the best of some passes."""
    buffer = torch.ones(math.ceil(size / 4), device=device)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        float(buffer.sum())
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


@contextmanager
def _disturbance() -> Iterator[dict[str, Any]]:
    """How many processors others kept busy meanwhile, and whether that was too many."""
    found: dict[str, Any] = {}
    own, start = psutil.Process(), time.perf_counter()

    def busy() -> float:
        times = psutil.cpu_times()
        mine = own.cpu_times()
        # The time of a guest is part of `user` already.
        return times.user + times.system + getattr(times, "nice", 0.0) - mine.user - mine.system

    before = busy()
    yield found
    others = max(busy() - before, 0.0) / (time.perf_counter() - start)
    found.update(others_busy=others, load_average=list(os.getloadavg()), noisy=others > BUSY)


def _versions() -> dict[str, str]:
    found = versions()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _fingerprint(model: str) -> str:
    if not Path(model).is_dir():
        weight_files(model, on_hub=True)  # weights that are still to be downloaded would be missing in it
    return checkpoint_fingerprint(model)


def _device_name(device: str) -> str:
    try:
        torch.empty(0, device=device)
        if device.startswith("cuda"):
            return torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:  # no such name; torch built without it
        raise ValueError(f"{device} cannot be computed on ({first_line(error)}). Name another --device.") from error
    return f"{device} {torch.backends.cpu.get_cpu_capability()}"
