"""`llm2slm benchmark`: cells measured by turns, kept as they come, and what is wrong with a sweep."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modeling_llm2slm.benchmark.benchmark as benchmark
import modeling_llm2slm.benchmark.contestants as contestants
from modeling_llm2slm.benchmark.benchmark import Benchmark, load_sweep
from modeling_llm2slm.benchmark.contestants import Cell, Models
from modeling_llm2slm.benchmark.plots import plot
from modeling_llm2slm.conversion.build import preset_config


STOCK = ("llm", "slm", "llm2slm")
CELLS = [
    Cell(prompt=6, answer=answer, batch=batch, beams=beams, preset="tiny", contestants=STOCK, repeats=2)
    for answer, batch, beams in ((5, 1, 1), (5, 2, 2), (9, 1, 1))
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, Benchmark(CELLS, folder / "benchmark.json", folder).run()


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
            assert timing["tokens_per_second"] == pytest.approx(cell.batch * cell.answer / timing["seconds"])
        assert ("first token, greedy" in row["stages_ms"]) == (cell.beams > 1)
        assert {"LLM", "projector", "first token"} <= set(row["stages_ms"])
    assert all(cost["load_seconds"] > 0 and cost["peak_bytes"] > 0 for cost in result["contestants"]["tiny"].values())


def test_the_floor_is_bytes_by_bandwidth(measured: tuple[Path, dict[str, Any]]) -> None:
    _, result = measured
    slm = preset_config("tiny").decoder
    model = contestants.slm_class(slm).from_config(slm)
    size = sum(parameter.nbytes for parameter in model.float().parameters())
    for cell in result["cells"].values():
        expected = size / (cell["gigabytes_per_second"] * 1e9) * 1000
        assert cell["results"]["slm"]["floor_ms_per_token"] == pytest.approx(expected)
        assert "floor_ms_per_token" not in cell["results"]["llm"]


def test_a_cell_that_is_there_is_not_measured_again(
    measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = measured
    monkeypatch.setattr(benchmark, "CONTESTANTS", dict.fromkeys(STOCK))  # using one would fail
    assert Benchmark(CELLS, folder / "benchmark.json", folder).run() == result


def test_another_setting_is_an_error(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = measured
    with pytest.raises(ValueError, match="another setting"):
        Benchmark(CELLS, folder / "benchmark.json", folder, threads=2)


def test_given_checkpoints_have_results_and_files_of_their_own(tmp_path: Path) -> None:
    output, cells = tmp_path / "benchmark.json", [Cell()]
    first = contestants.make_models("tiny", tmp_path)
    copy = shutil.copytree(first.llm2slm, tmp_path / "copy")
    benchmarks = [Benchmark(cells, output, tmp_path, models) for models in (first, replace(first, llm2slm=str(copy)))]
    (copy / "generation_config.json").write_text("{}")
    other = Benchmark(cells, output, tmp_path, replace(first, llm2slm=str(copy)))
    same, moved, changed = ({str(run._models("").folder), str(run.result["setting"])} for run in (*benchmarks, other))
    assert same == moved
    assert not same & changed
    benchmarks[0]._keep()
    with pytest.raises(ValueError, match="another setting: with other checkpoints"):
        Benchmark(cells, output, tmp_path, replace(first, llm2slm=str(copy)))


def test_published_results_of_presets_know_of_no_checkpoints(tmp_path: Path) -> None:
    published = json.loads((Path(__file__).parents[1] / "docs" / "results" / "benchmark.json").read_text())
    models = Models(tmp_path, "no/llm", "no/llm2slm")
    fresh = Benchmark(CELLS, tmp_path / "benchmark.json", tmp_path, models)
    assert fresh.result["setting"].keys() == published["setting"].keys()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_an_error_of_one_line(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"{device} cannot be computed on .* Name another --device") as caught:
        Benchmark(CELLS, tmp_path / "benchmark.json", tmp_path, device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"setting": {', "[1]", '{"cells": {}}'], ids=["cut", "list", "other"])
def test_what_is_no_result_is_an_error_and_stays(tmp_path: Path, text: str) -> None:
    file = tmp_path / "benchmark.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="no result of a benchmark"):
        Benchmark(CELLS, file, tmp_path)
    assert file.read_text() == text


def test_answers_have_as_many_tokens_as_said(measured: tuple[Path, dict[str, Any]]) -> None:
    """An end token among random weights' answers would make an answer look fast."""
    folder, _ = measured
    model: Any = contestants.load_composite(contestants.make_models("tiny", folder / "tiny"), "cpu")
    lengths = []
    for _ in range(20):
        ids = torch.randint(10, model.config.encoder.vocab_size, (1, 6))
        lengths.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30).shape[1])
    assert set(lengths) == {31}


def test_flops_are_those_of_weights_and_tokens(measured: tuple[Path, dict[str, Any]]) -> None:
    """Of a T5 with a GPT-2, almost all arithmetic is two operations for each weight and token."""
    models = contestants.make_models("tiny", measured[0] / "tiny")
    count = benchmark._Flops(models)
    short, long = count.ratio(Cell(prompt=4, answer=2)), count.ratio(Cell(prompt=4, answer=100))
    llm, slm = count.llm, count.composite.decoder
    width = llm.config.d_model * llm.config.vocab_size
    by_token = sum(p.numel() for p in llm.decoder.parameters()) - llm.shared.weight.numel() + width
    limit = by_token / sum(p.numel() for name, p in slm.named_parameters() if "wpe" not in name)
    assert abs(long - limit) < abs(short - limit)
    assert long == pytest.approx(limit, rel=0.3)


def test_a_disturbed_cell_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = benchmark.psutil
    ticks = iter([100.0, 109.0])
    times = type("Times", (), {"system": 0.0, "nice": 0.0})
    monkeypatch.setattr(psutil, "cpu_times", lambda: type("Now", (times,), {"user": next(ticks)})())
    with benchmark._disturbance() as found:
        pass
    assert found["noisy"]
    assert found["others_busy"] > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: 3", "not a sweep"),
        ("rows: []", "not a sweep"),
        ("cells: [{prompt: 3, reply: 4}]", "reply"),
        ("cells: [" + "{prompt: 3}, " * 41 + "]", "41 cells"),
    ],
)
def test_what_is_no_sweep(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sweep(tmp_path / "sweep.yaml")


def test_an_unknown_contestant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no contestant 'llm3'; there are llm, "):
        Benchmark([Cell(contestants=("llm3",))], tmp_path / "benchmark.json", tmp_path)


def test_the_default_sweep_is_one() -> None:
    cells = load_sweep(Path(__file__).parents[1] / "configuration" / "benchmark.yaml")
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(set(cell.contestants) <= set(contestants.CONTESTANTS) for cell in cells)
    assert all(preset_config(cell.preset) for cell in cells)


def test_plots(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = plot(measured[1], tmp_path)
    assert [file.name for file in files] == ["time.svg"]  # only the answer's length varies alone
    text = files[0].read_text()
    assert all(name in text for name in STOCK)
