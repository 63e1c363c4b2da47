"""Benchmarks: cells measured in turns and stored one by one, and settings that do not match a stored result."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.benchmark import benchmark
from modeling_llm2slm.benchmark.benchmark import Benchmark
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.conversion.build import preset_config
from modeling_llm2slm.inference.engine import BenchmarkModels, Contestant
from modeling_llm2slm.parts_llm2slm import slm_class
from modeling_llm2slm.settings import BenchmarkSettings

from .conftest import CELLS, STOCK


RESULTS = Path(__file__).parents[3] / "docs" / "results"


def test_every_cell_has_every_contestant(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = measured
    assert json.loads((folder / "benchmark.json").read_text()) == result
    assert list(result["cells"]) == [cell.key for cell in CELLS]
    for cell, row in zip(CELLS, result["cells"].values(), strict=True):
        assert set(row["results"]) == set(STOCK)
        for timing in row["results"].values():
            assert 0 < timing["first_token_ms"] < 1000 * timing["seconds"]
            assert 0 < timing["ms_per_token"] < 1000 * timing["seconds"]
            assert len(timing["rounds"]) == 2
            assert timing["tokens_per_second"] == pytest.approx(cell.batch * cell.output / timing["seconds"])
        assert ("first token, greedy" in row["stages_ms"]) == (cell.beams > 1)
        assert {"LLM", "projector", "first token"} <= set(row["stages_ms"])
    assert all(cost["load_seconds"] > 0 and cost["peak_bytes"] > 0 for cost in result["contestants"]["tiny"].values())


def test_a_cell_has_the_keys_of_the_published_results(measured: tuple[Path, dict[str, Any]]) -> None:
    for name in ("benchmark.json", "benchmark-engines.json"):
        published = json.loads((RESULTS / name).read_text())
        for cell in published["cells"].values():
            assert cell.keys() <= next(iter(measured[1]["cells"].values())).keys()
            for row in cell["results"].values():
                assert row["rounds"][0].keys() == {"first", "token", "total"}


def test_the_floor_is_bytes_divided_by_bandwidth(measured: tuple[Path, dict[str, Any]]) -> None:
    _, result = measured
    slm = preset_config("tiny").decoder
    model = slm_class(slm).from_config(slm)
    size = sum(parameter.nbytes for parameter in model.float().parameters())
    for cell in result["cells"].values():
        expected = size / (cell["gigabytes_per_second"] * 1e9) * 1000
        assert cell["results"]["slm"]["floor_ms_per_token"] == pytest.approx(expected)
        assert "floor_ms_per_token" not in cell["results"]["llm"]


def test_a_stored_cell_is_not_measured_again(
    measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = measured
    unusable = Contestant(load=None)  # type: ignore[arg-type]
    monkeypatch.setattr(benchmark, "contestants", lambda: dict.fromkeys(STOCK, unusable))
    assert Benchmark(CELLS, folder / "benchmark.json", folder).run() == result


def test_a_result_of_another_setting_is_an_error(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = measured
    with pytest.raises(ValueError, match="another setting"):
        Benchmark(CELLS, folder / "benchmark.json", folder, BenchmarkSettings(threads=2))


def test_given_checkpoints_have_results_and_files_of_their_own(tmp_path: Path) -> None:
    output, cells = tmp_path / "benchmark.json", [Cell()]
    first = make_models("tiny", tmp_path)
    copy = shutil.copytree(first.llm2slm, tmp_path / "copy")
    moved_models = replace(first, llm2slm=str(copy))
    benchmarks = [Benchmark(cells, output, tmp_path, models=models) for models in (first, moved_models)]
    (copy / "generation_config.json").write_text("{}")
    other = Benchmark(cells, output, tmp_path, models=moved_models)
    same, moved, changed = ({str(run._models("").folder), str(run.result["setting"])} for run in (*benchmarks, other))
    assert same == moved
    assert not same & changed
    benchmarks[0]._save()
    with pytest.raises(ValueError, match="another setting: with other checkpoints"):
        Benchmark(cells, output, tmp_path, models=moved_models)


def test_results_of_presets_do_not_depend_on_given_checkpoints(tmp_path: Path) -> None:
    published = json.loads((RESULTS / "benchmark.json").read_text())
    models = BenchmarkModels(tmp_path, "no/llm", "no/llm2slm")
    fresh = Benchmark(CELLS, tmp_path / "benchmark.json", tmp_path, models=models)
    assert fresh.result["setting"].keys() == published["setting"].keys()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_missing_device_is_an_error_of_one_line(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"{device} cannot be used .* Choose another --device") as caught:
        Benchmark(CELLS, tmp_path / "benchmark.json", tmp_path, BenchmarkSettings(device=device))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"setting": {', "[1]", '{"cells": {}}'], ids=["cut", "list", "other"])
def test_a_file_that_is_not_a_result_is_an_error_and_stays(tmp_path: Path, text: str) -> None:
    file = tmp_path / "benchmark.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="not the result of a benchmark"):
        Benchmark(CELLS, file, tmp_path)
    assert file.read_text() == text


@pytest.mark.parametrize(
    "damage", ["contestants", "cells", "results", "seconds", "stages_ms", "preset", "load_seconds"]
)
def test_a_damaged_result_is_an_error(measured: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str) -> None:
    def damaged(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [] if name == damage else damaged(entry) for name, entry in value.items()}

    (tmp_path / "benchmark.json").write_text(json.dumps(damaged(measured[1])))
    with pytest.raises(ValueError, match=r"not the result of a benchmark\. Choose another file"):
        Benchmark(CELLS, tmp_path / "benchmark.json", tmp_path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell(preset="tiny", prompt=10**6), "The prompt has 1000000 tokens"),
        (Cell(preset="nope"), "There is no preset 'nope'"),
        (Cell(), "A cell names no preset"),
    ],
)
def test_a_cell_that_cannot_be_measured_is_refused_before_the_others(tmp_path: Path, cell: Cell, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Benchmark([*CELLS, cell], tmp_path / "benchmark.json", tmp_path)


def test_an_unknown_contestant_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Contestant 'llm3' does not exist\. Choose from: llm, "):
        Benchmark([Cell(contestants=("llm3",))], tmp_path / "benchmark.json", tmp_path)


def test_the_best_llm_is_what_the_best_model_is_compared_with(measured: tuple[Path, dict[str, Any]]) -> None:
    for cell in measured[1]["cells"].values():
        rows = cell["results"]
        expected = rows["llm"]["seconds"] / rows["llm2slm"]["seconds"]
        assert cell["best"] == {"llm": "llm", "llm2slm": "llm2slm", "speedup": expected}
