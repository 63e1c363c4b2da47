"""Time LLM, SLM and LLM-to-SLM on every engine, in turns within one run, with the bound that bandwidth sets."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..conversion.build import preset_config
from ..data.atomic import atomic_write, remove_unfinished
from ..data.output_paths import check_output, locked
from ..data.parsing import read_json
from ..data.records import COUNT, MAPPING, NUMBER, SWITCH, TEXT, mapping_to, record_of, write_json
from ..data.resources import peak_memory
from ..evaluation.timing import Timing, median_timing, time_in_turns
from ..files_llm2slm import first_line, weight_files
from ..inference.engine import BenchmarkModels, fingerprint_of
from ..settings import BenchmarkSettings
from .cells import Cell
from .contestants import TimedContestant, contestants, load_contestant
from .machine import bandwidth, device_name, disturbance, engine_versions
from .models import make_models
from .stages import Flops, Stages


Progress = Callable[[str], None]
# What a result must hold to be continued, printed and plotted.
_ROW = record_of(dict.fromkeys(("seconds", "first_token_ms", "ms_per_token", "tokens_per_second"), NUMBER))
_CELL = record_of(
    {
        **dict.fromkeys(("prompt", "output", "batch", "beams"), COUNT),
        **dict.fromkeys(("gigabytes_per_second", "others_busy"), NUMBER),
        "preset": TEXT,
        "noisy": SWITCH,
        "results": mapping_to(_ROW),
        "stages_ms": mapping_to(NUMBER),
    }
)
_COSTS = mapping_to(record_of(dict.fromkeys(("load_seconds", "peak_bytes"), NUMBER)))
RESULT = record_of({"setting": MAPPING, "contestants": mapping_to(_COSTS), "cells": mapping_to(_CELL)})


class Benchmark:
    """
    A run over cells. Each is stored as soon as it is measured, and a repeated run measures only the missing ones.

    Args:
        cells: The cells to measure.
        output: The JSON file of the result.
        work: A folder for models with random weights and their exports, which are large and kept.
        settings: Device and threads. A CPU computes in float32, other devices in bfloat16.
        models: Checkpoints for cells without a preset. Contestants made from them get a subfolder of `models.folder`.
        progress: Called with a few words at every step.

    Raises:
        OSError: If the output cannot be written.
        ValueError: If the output belongs to another machine, device or checkpoint, or a cell names an unknown
            contestant.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        output: Path,
        work: Path,
        settings: BenchmarkSettings = BenchmarkSettings(),  # noqa: B008 - immutable
        models: BenchmarkModels | None = None,
        progress: Progress = lambda step: None,
    ):
        check_output(output, overwrite=True, inputs=(models.llm, models.llm2slm) if models is not None else ())
        check_output(work, folder=True, overwrite=True)
        self.cells = cells
        self.output = output
        self.work = work
        self.settings = settings
        self.given = models
        self.progress = progress
        self.contestants = contestants()
        self._left_out: set[tuple[str, str]] = set()  # presets, and contestants that cannot compute their models
        for cell in cells:
            if unknown := set(cell.contestants) - set(self.contestants):
                names = ", ".join(self.contestants)
                raise ValueError(f"Contestant {unknown.pop()!r} does not exist. Choose from: {names}.")
            for name in cell.contestants:
                self.contestants[name].check_installed(name)
            if cell.preset:
                preset_config(cell.preset).check_length(cell.prompt, cell.output)
            elif models is None:
                raise ValueError("A cell names no preset: pass the checkpoints to compare (--llm and --llm2slm).")
        self.result = self._load_result()

    def run(self, prepare_only: bool = False) -> dict[str, Any]:
        """
        Measure the missing cells, and return the whole result.

        Args:
            prepare_only: Only make all contestants, which takes most of the time, and load each once. A later run then
                measures.
        """
        with locked(self.output), locked(self.work):
            return self._run(prepare_only)

    def _run(self, prepare_only: bool) -> dict[str, Any]:
        torch.set_num_threads(self.settings.threads)
        for preset in dict.fromkeys(cell.preset for cell in self.cells):
            cells = [cell for cell in self.cells if cell.preset == preset]
            if all(cell.key in self.result["cells"] for cell in cells):
                continue
            models = self._models(preset)
            costs = self.result["contestants"].setdefault(preset or "given", {})
            named = {name for cell in cells for name in cell.contestants}
            for name in dict.fromkeys(name for cell in cells for name in self._names(cell)):
                if name not in costs:
                    try:
                        costs[name] = self._cost(name, models)
                    except ValueError as error:
                        if name in named:
                            raise
                        self.progress(f"{name} is left out: {first_line(error)}")
                        self._left_out.add((preset, name))
                    self._save()
            if not prepare_only:
                self._measure_all(cells, models)
        return self.result

    def _load_result(self) -> dict[str, Any]:
        """Return the result so far. `self.given` gets a folder of its own for each pair of checkpoints."""
        setting: dict[str, Any] = {
            "device": device_name(self.settings.device),
            "threads": self.settings.threads,
            "versions": engine_versions(),
        }
        if self.given is not None and not all(cell.preset for cell in self.cells):
            prints = {name: _fingerprint(getattr(self.given, name)) for name in ("llm", "llm2slm")}
            setting["given"] = prints
            folder = "-".join(digest[:8] for digest in prints.values())
            self.given = replace(self.given, folder=self.given.folder / folder)
        if not self.output.is_file():
            return {"setting": setting, "contestants": {}, "cells": {}}
        try:
            result = read_json(self.output)
        except ValueError:
            result = None
        if not RESULT.holds(result):
            raise ValueError(f"{self.output} is not the result of a benchmark. Choose another file.")
        if result["setting"] != setting:
            raise ValueError(
                f"{self.output} was measured in another setting: with other checkpoints, versions or threads, or on "
                "another device. Choose another file, or remove it."
            )
        return result

    def _models(self, preset: str) -> BenchmarkModels:
        if not preset:
            assert self.given is not None
            return self.given
        self.progress(f"{preset}: making models of its sizes")
        return make_models(preset, self.work / preset)

    def _names(self, cell: Cell) -> tuple[str, ...]:
        installed = (name for name, contestant in self.contestants.items() if contestant.can_run)
        names = cell.contestants or tuple(installed)
        names = tuple(name for name in names if (cell.preset, name) not in self._left_out)
        return tuple(name for name in names if cell.beams == 1 or self.contestants[name].beams)

    def _cost(self, name: str, models: BenchmarkModels) -> dict[str, float]:
        """Make a contestant if necessary, and load it in a process of its own, for its time and memory."""
        contestant, folder = self.contestants[name], models.folder / name
        if contestant.make is not None and not folder.exists():
            self.progress(f"making {name}")
            remove_unfinished(folder)
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                contestant.make(models, temporary)
        self.progress(f"loading {name}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_load_apart, name, models, self.settings).result()

    def _measure_all(self, cells: list[Cell], models: BenchmarkModels) -> None:
        stages, flops = Stages(models, self.settings.device), Flops(models)
        loaded: dict[str, TimedContestant] = {}
        for cell in cells:
            if cell.key in self.result["cells"]:
                continue
            names = self._names(cell)
            for name in names:
                if name not in loaded:
                    loaded[name] = load_contestant(name, models, self.settings.device)
            measured = self._measure(cell, {name: loaded[name] for name in names}, stages, models)
            self.result["cells"][cell.key] = measured | {"llm_flops_by_llm2slm_flops": flops.ratio(cell)}
            self._save()

    def _measure(
        self, cell: Cell, timed: dict[str, TimedContestant], stages: Stages, models: BenchmarkModels
    ) -> dict[str, Any]:
        speed = bandwidth(stages.decode_bytes, self.settings.device)
        in_turn: dict[str, Callable[[Cell], Any]] = {**timed, **({"stages": stages} if "llm2slm" in timed else {})}
        with disturbance() as found:
            times = time_in_turns(
                in_turn,
                [cell] * cell.repeats,
                warm_up=replace(cell, output=min(cell.output, 8)),
                progress=lambda turn, name: self.progress(f"{cell.key}: round {turn} of {cell.repeats}, {name}"),
            )
        by_stage: list[dict[str, float]] = times.pop("stages", [])
        rows = {name: _row(cell, timings) for name, timings in times.items()}
        for name, row in rows.items():
            if self.contestants[name].model != "llm":
                row["floor_ms_per_token"] = 1000 * self._step_bytes(name, stages, models) / speed
        return {
            **{key: value for key, value in asdict(cell).items() if key != "contestants"},
            "results": rows,
            "best": self._best(rows),
            "stages_ms": {name: 1000 * statistics.median(one[name] for one in by_stage) for name in by_stage[0]}
            if by_stage
            else {},
            "gigabytes_per_second": speed / 1e9,
            **found,
        }

    def _best(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Return the names of the fastest LLM and LLM-to-SLM contestants, and how many times as fast the second is."""
        best: dict[str, Any] = {}
        for kind in ("llm", "llm2slm"):
            names = [name for name in rows if self.contestants[name].model == kind]
            best |= {kind: min(names, key=lambda name: rows[name]["seconds"])} if names else {}
        if len(best) == 2:
            best["speedup"] = rows[best["llm"]]["seconds"] / rows[best["llm2slm"]]["seconds"]
        return best

    def _step_bytes(self, name: str, stages: Stages, models: BenchmarkModels) -> int:
        """Return the bytes of weights that a contestant reads for each token."""
        contestant = self.contestants[name]
        if contestant.step_bytes is not None:
            return contestant.step_bytes(models.folder / name)
        return stages.decode_bytes * contestant.bits // 32

    def _save(self) -> None:
        write_json(self.output, self.result)


def _row(cell: Cell, timings: Sequence[Timing]) -> dict[str, Any]:
    median: Any = median_timing(timings)
    return {
        "seconds": median.total,
        "first_token_ms": 1000 * median.first,
        "ms_per_token": 1000 * median.per_token,
        "tokens_per_second": cell.batch * cell.output / median.total,
        "rounds": [{"first": time.first, "token": time.per_token, "total": time.total} for time in timings],
    }


def _load_apart(name: str, models: BenchmarkModels, settings: BenchmarkSettings) -> dict[str, float]:
    """Return the seconds of loading, and the bytes that the model and a short output add to those of the imports."""
    torch.set_num_threads(settings.threads)
    before = peak_memory()
    start = time.perf_counter()
    timed = load_contestant(name, models, settings.device)
    seconds = time.perf_counter() - start
    timed(Cell(prompt=64, output=4))
    return {"load_seconds": seconds, "peak_bytes": peak_memory() - before}


def _fingerprint(model: str) -> str:
    if not Path(model).is_dir():
        weight_files(model, on_hub=True)  # else the fingerprint would miss weights that are not downloaded yet
    return fingerprint_of(model)
