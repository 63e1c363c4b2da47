"""The benchmark of a GPU, on a CPU with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GPUBenchmark, make_models, plan, step_bytes


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return make_models("t5-large", "cpu", tiny=True)


@pytest.fixture(autouse=True)
def one_llm(monkeypatch: pytest.MonkeyPatch, models: dict[str, Any]) -> None:
    monkeypatch.setattr(gpu, "LLMS", gpu.LLMS[:1])
    monkeypatch.setattr(gpu, "make_models", lambda *_: models)


def test_a_cell_is_saved_when_it_is_measured_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measure, measured = tmp_path / "gpu.json", GPUBenchmark.measure, []

    def second_fails(self: GPUBenchmark, mode: str, llm: str, batch: int) -> dict[str, Any]:
        measured.append(batch)
        if len(measured) == 2:
            raise RuntimeError("the machine is gone")
        return measure(self, mode, llm, batch)

    monkeypatch.setattr(GPUBenchmark, "measure", second_fails)
    with pytest.raises(RuntimeError, match="gone"):
        GPUBenchmark(output, "cpu", 9, tiny=True, rounds=1).run(["eager"], [1, 2])
    assert list(json.loads(output.read_text())["cells"]) == ["t5-large eager batch 1"]
    again = GPUBenchmark(output, "cpu", 9, tiny=True, rounds=1)
    again.run(["eager"], [1, 2])
    assert measured == [1, 2, 2]
    for cell in again.result["cells"].values():
        assert list(cell["results"]) == ["llm", *gpu.SLMS]
        assert not cell["errors"]
        for row in cell["results"].values():
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_token"])
            assert row["tokens_per_second"] > 0
    with pytest.raises(ValueError, match="another setting.*remove it"):
        GPUBenchmark(output, "cpu", 9, tiny=True, rounds=2)


def test_no_cell_starts_without_time_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    GPUBenchmark(output, "cpu", 0.1, tiny=True, rounds=1).run(["eager"], [1])
    assert capsys.readouterr().out == "t5-large eager batch 1: no time left\n"
    assert not output.exists()


def test_a_contestant_that_fails_is_named_and_the_others_run(
    tmp_path: Path, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = GPUBenchmark(tmp_path / "gpu.json", "cpu", 9, tiny=True, rounds=1)
    benchmark.result["gigabytes_per_second"] = 1.0
    monkeypatch.setattr(models["gpt2"].config.decoder, "n_positions", 2)
    cell = benchmark.measure("eager", "t5-large", 1)
    assert list(cell["results"]) == ["llm", "smollm-135m", "t5-small"]
    assert "positions" in cell["errors"]["gpt2"]


def test_the_models_share_the_encoder_and_a_step_reads_the_decoders_weights(models: dict[str, Any]) -> None:
    assert {model.dtype for model in models.values()} == {torch.bfloat16}
    llm, slm = models["llm"], models["gpt2"]
    assert slm.encoder.llm.encoder is llm.encoder
    assert step_bytes(slm) == 2 * slm.decoder.num_parameters()
    assert step_bytes(llm) == 2 * llm.decoder.num_parameters()  # its output layer is tied to its embedding


def test_cheap_cells_come_first() -> None:
    cells = list(plan(gpu.MODES, (1, 8, 64)))
    assert cells == [(mode, "t5-large", batch) for mode in ("eager", "compiled") for batch in (1, 64, 8)]
