"""Cache layers that reserve memory hold what stock layers hold, and their steps copy nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from modeling_llm2slm.reserving import ReservingLayer
from tests.support.common import (
    PROMPTS,
    pad_prompts,
    shared_family,
)


def states(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, length, 4)


def both(layers: list[DynamicLayer], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Update a stock layer and a reserving one alike; both return the same."""
    for ours, stock in zip(*(layer.update(keys, values) for layer in layers), strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("change", ["none", "crop", "reorder", "repeat", "select", "copy", "reset"])
def test_it_holds_what_a_stock_layer_holds(change: str) -> None:
    layers: list[DynamicLayer] = [ReservingLayer(), DynamicLayer()]
    both(layers, states(5), states(5))
    both(layers, states(1), states(1))
    rows = 2
    if change == "copy":  # and updates of the original do not change the copy
        kept = copy.deepcopy(layers[0])
        both(layers, states(1), states(1))
        assert torch.equal(kept.keys, layers[0].keys[..., :6, :])
        layers[0] = kept
        layers[1].crop(-1)
    for layer in layers:
        if change == "crop":
            layer.crop(-3)
        elif change == "reorder":
            layer.reorder_cache(torch.tensor([1, 1]))
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
            rows = 4
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1]))
            rows = 1
        elif change == "reset":
            layer.reset()
    for _ in range(80):  # beyond what is reserved
        both(layers, states(1, rows), states(1, rows))
    assert layers[0].get_seq_length() == layers[1].get_seq_length()


def test_a_step_writes_and_copies_nothing() -> None:
    layer, places = ReservingLayer(), set()
    layer.update(states(40), states(40))
    for _ in range(30):
        before = layer.keys
        layer.update(states(1), states(1))
        places.add(layer.keys.data_ptr())
        assert before.data_ptr() == layer.keys.data_ptr()
    assert len(places) == 1


def test_gradients_pass_through() -> None:
    layer = ReservingLayer()
    first, second = states(3).requires_grad_(), states(1).requires_grad_()
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.square().sum().backward()
    assert torch.equal(first.grad, 2 * first)
    assert torch.equal(second.grad, 2 * second)


@pytest.mark.parametrize("slm", ["gpt2", "t5"])
def test_generate_uses_it(slm: str) -> None:
    output = shared_family(slm).model.generate(
        **pad_prompts(PROMPTS), max_new_tokens=4, return_dict_in_generate=True, do_sample=False
    )
    assert {type(layer) for layer in output.past_key_values.self_attention_cache.layers} == {ReservingLayer}
