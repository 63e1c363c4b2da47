"""Contestants: outputs of the length that a cell asks for, on PyTorch and on engines without `generate()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from modeling_llm2slm.benchmark import benchmark
from modeling_llm2slm.benchmark import contestants as module
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.contestants import endless, load_contestant
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.inference.engine import Contestant, engine
from tests.support.exports import needs


def test_outputs_have_the_length_of_the_cell(measured: tuple[Path, dict[str, Any]]) -> None:
    """An end token among the outputs of random weights would make a model look fast."""
    models = make_models("tiny", measured[0] / "tiny")
    model: Any = endless(engine("pytorch").contestants()["llm2slm"].load(models, models.folder, "cpu"))
    lengths = []
    for _ in range(20):
        ids = torch.randint(10, model.config.encoder.vocab_size, (1, 6))
        lengths.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30).shape[1])
    assert set(lengths) == {31}


def test_a_function_is_timed_at_two_lengths(
    measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[int, ...], int, int]] = []

    def generate(ids: torch.Tensor, new_tokens: int, num_beams: int) -> None:
        calls.append((tuple(ids.shape), new_tokens, num_beams))

    contestant = Contestant(load=lambda models, folder, device: generate, model="llm")
    monkeypatch.setattr(module, "contestants", lambda: {"function": contestant})
    timing = load_contestant("function", make_models("tiny", measured[0] / "tiny"), "cpu")(
        Cell(prompt=6, output=9, batch=2, beams=4)
    )
    assert calls == [((2, 6), 1, 4), ((2, 6), 9, 4)]
    assert timing.tokens == 9
    assert timing.per_token == pytest.approx((timing.total - timing.first) / 8)


def test_the_llm_generates_the_same_tokens_on_another_engine(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    needs("openvino")
    models = make_models("tiny", measured[0] / "tiny")
    contestant = engine("openvino").contestants()["llm-openvino-fp32"]
    assert contestant.model == "llm"
    assert contestant.make is not None
    contestant.make(models, tmp_path)
    llm: Any = AutoModelForSeq2SeqLM.from_pretrained(models.llm).eval()
    ids = torch.randint(10, llm.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    fast = contestant.load(models, tmp_path, "cpu")
    for options in ({}, {"num_beams": 3}):
        found = [model.generate(ids, attention_mask=mask, max_new_tokens=12, **options) for model in (llm, fast)]
        assert torch.equal(*found)


def test_cells_with_beams_leave_out_a_contestant_without(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(models: Any, folder: Path, device: str) -> Any:
        return lambda ids, new_tokens, num_beams: None

    found = {name: Contestant(load=load, model="llm", beams=name == "with") for name in ("with", "without")}
    for each in (module, benchmark):
        monkeypatch.setattr(each, "contestants", lambda: found)
    monkeypatch.setattr(benchmark.Benchmark, "_cost", lambda *arguments: {"load_seconds": 0.0, "peak_bytes": 0})
    cells = [Cell(prompt=4, output=2, beams=beams, preset="tiny", contestants=tuple(found)) for beams in (1, 2)]
    result = benchmark.Benchmark(cells, tmp_path / "result.json", measured[0]).run()
    assert [list(cell["results"]) for cell in result["cells"].values()] == [["with", "without"], ["with"]]


def test_a_contestant_that_cannot_compute_the_models_is_left_out_unless_it_is_named(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(models: Any, folder: Path) -> None:
        raise ValueError("It knows no T5.")

    def load(models: Any, folder: Path, device: str) -> Any:
        return lambda ids, new_tokens, num_beams: None

    found = {"one": Contestant(load=load, model="llm"), "other": Contestant(load=load, make=refuse, model="llm")}
    for each in (module, benchmark):
        monkeypatch.setattr(each, "contestants", lambda: found)
    cost = benchmark.Benchmark._cost
    monkeypatch.setattr(benchmark.Benchmark, "_cost", lambda *these: cost(*these) if these[1] == "other" else {})
    steps: list[str] = []
    cell = Cell(prompt=4, output=2, preset="tiny")
    result = benchmark.Benchmark([cell], tmp_path / "result.json", measured[0], progress=steps.append).run()
    assert [list(cell["results"]) for cell in result["cells"].values()] == [["one"]]
    assert "other is left out: It knows no T5." in steps
    cells = [Cell(prompt=4, output=2, preset="tiny", contestants=("one", "other"))]
    with pytest.raises(ValueError, match="It knows no T5"):
        benchmark.Benchmark(cells, tmp_path / "named.json", measured[0]).run()
