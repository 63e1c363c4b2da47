"""Operations of an output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.benchmark.stages import Flops


def test_operations_are_two_for_each_weight_and_token(measured: tuple[Path, dict[str, Any]]) -> None:
    """Nearly: for a T5 and a GPT-2, attention and norms are a small part of the arithmetic."""
    models = make_models("tiny", measured[0] / "tiny")
    count = Flops(models)
    short, long = count.ratio(Cell(prompt=4, output=2)), count.ratio(Cell(prompt=4, output=100))
    llm, slm = count.llm, count.composite.decoder
    width = llm.config.d_model * llm.config.vocab_size
    by_token = sum(p.numel() for p in llm.decoder.parameters()) - llm.shared.weight.numel() + width
    limit = by_token / sum(p.numel() for name, p in slm.named_parameters() if "wpe" not in name)
    assert abs(long - limit) < abs(short - limit)
    assert long == pytest.approx(limit, rel=0.3)


def test_the_arithmetic_of_attention_is_counted(measured: tuple[Path, dict[str, Any]]) -> None:
    """Both read the prompt with the same encoder. Its attention grows with the square of the prompt's length."""
    count = Flops(make_models("tiny", measured[0] / "tiny"))
    config = count.llm.config
    length, heads = 1000, config.num_layers * config.num_heads * config.d_kv
    attention = 2 * 2 * length**2 * heads  # queries by keys, and weights by values
    reader = sum(p.numel() for p in count.llm.encoder.parameters()) - count.llm.shared.weight.numel()
    for model in ("llm", "composite"):
        assert count.operations(getattr(count, model), Cell(prompt=length, output=2)) > attention + 2 * length * reader
