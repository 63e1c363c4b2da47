"""Exported models of fusion "cache": the keys and values of the prompt graph begin the state of the step graph."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import families
from tests.support.common import PROMPTS, pad_prompts, strip_padding
from tests.support.exports import (
    Pair,
    check_continuation,
    check_prompt_lengths,
    check_strategies,
    check_threads,
    eager,
    exported_folder,
    learned,
    needs,
    pair_of,
)


KINDS = (("gemma3", "cache"), ("gpt2", "cache_again"))


def eager_pair(family: str, fusion: str) -> Pair:
    model = learned(family, fusion)
    return Pair(model, eager(copy.deepcopy(model)))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def pair(request) -> Pair:
    return eager_pair(*request.param)


def test_all_strategies_give_the_tokens_of_pytorch(pair) -> None:
    check_strategies(pair)
    check_continuation(pair)


def test_a_prefix_is_continued_and_prompt_states_are_reused(pair) -> None:
    batch = pad_prompts(PROMPTS, "left", extra=1)
    whole = pair.outputs(**batch, max_new_tokens=8)[1]
    expected, found = pair.outputs(**batch, decoder_input_ids=whole[:, :4], num_beams=2)
    assert torch.equal(expected, found)
    states, from_pytorch = pair.exported.encode_prompt(**batch), pair.model.encode_prompt(**batch)
    kept = states.attention_mask.bool()
    torch.testing.assert_close(states.last_hidden_state[kept], from_pytorch.last_hidden_state[kept])
    torch.testing.assert_close(states.first, from_pytorch.first)
    for given in (states, states, from_pytorch):
        assert torch.equal(pair.exported.generate(encoder_outputs=given, max_new_tokens=8), whole)


def test_a_prompt_of_one_token_and_one_longer_than_a_sliding_window(pair) -> None:
    check_prompt_lengths(pair)


def test_the_first_token_needs_the_logits_of_the_llm() -> None:
    exported = eager_pair(*KINDS[0]).exported
    states = exported.encode_prompt(torch.tensor(PROMPTS[:1]))
    states.first = None
    with pytest.raises(ValueError, match="comes from the LLM's logits"):
        exported.generate(encoder_outputs=states, max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.SHARING)
def test_openvino_gives_the_tokens_of_pytorch(tmp_path_factory, family) -> None:
    pair = pair_of(tmp_path_factory, family, "cache")
    check_strategies(pair)
    check_continuation(pair)
    check_threads(pair)
    expected, found = pair.outputs(input_ids=torch.tensor([[3 + number for number in range(20)]]))
    assert torch.equal(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "family", "fusion"), [("openvino", *KINDS[1]), ("onnx", *KINDS[0])])
def test_other_exports_give_the_tokens_of_pytorch(tmp_path_factory, engine, family, fusion) -> None:
    pair = pair_of(tmp_path_factory, family, fusion, engine)
    check_strategies(pair)
    check_continuation(pair)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_quantized_weights_generate_the_first_tokens_of_pytorch(tmp_path_factory, weights) -> None:
    needs("openvino")
    folder = exported_folder(tmp_path_factory, "gemma3", "cache", weights)
    exported = type(eager_pair(*KINDS[0]).exported).from_pretrained(folder)
    expected, found = Pair(learned(*KINDS[0]), exported).outputs(**pad_prompts(PROMPTS), max_new_tokens=2)
    assert strip_padding(found) == strip_padding(expected)
