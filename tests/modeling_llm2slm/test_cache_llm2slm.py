"""What a model carries between steps: prompt states, the SLM's cache, masks and positions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from modeling_llm2slm import PromptStates
from modeling_llm2slm.cache_llm2slm import (
    LLM2SLMCache,
    as_llm2slm_cache,
    as_prompt_states,
    check_continues,
    labels_mask,
    mask_and_positions,
    padding_to,
    reorder,
)
from tests.support import families
from tests.support.common import (
    PROMPTS,
    check_outputs_vary,
    compose,
    learn_by_heart,
    pad_prompts,
    strip_padding,
)


@dataclass
class WithKeys(PromptStates):
    """Prompt states with a further tensor for each prompt."""

    keys_of_prompt: torch.Tensor = None  # type: ignore[assignment]


def prompt_states(copies: int = 1) -> WithKeys:
    """Return the states of two prompts, of two and three tokens."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]]).repeat_interleave(copies, dim=0)
    return WithKeys(torch.randn(2, 3, 4), mask, keys_of_prompt=torch.randn(2, 5))


def cache_of(length: int) -> DynamicCache:
    """Return a cache of one layer that holds `length` tokens of two rows."""
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, length, 4), torch.zeros(2, 1, length, 4), 0)
    return cache


def test_given_prompt_states_are_returned_themselves() -> None:
    states = prompt_states()
    assert as_prompt_states(states, states.attention_mask, check=True) is states
    with pytest.raises(ValueError, match="belong to different prompts"):
        as_prompt_states(states, torch.ones(2, 3), check=True)


def test_saved_states_load_with_the_defaults_of_torch(tmp_path: Path) -> None:
    """Also those of a fusion's own class, which no list names."""
    for states in (prompt_states(), PromptStates(torch.randn(2, 3, 4), hidden_states=(torch.randn(2, 3, 4), None))):
        torch.save({"row": [states]}, tmp_path / "states.pt")
        loaded = torch.load(tmp_path / "states.pt")["row"][0]
        assert type(loaded) is type(states)
        assert list(loaded) == list(states)
        torch.testing.assert_close(dict(loaded), dict(states))
        torch.testing.assert_close(dict(copy.deepcopy(states)), dict(states))


@pytest.mark.parametrize("kind", ["output", "tuple"])
def test_a_bare_last_hidden_state_takes_the_mask_of_the_call(kind: str) -> None:
    hidden_states, mask = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 1, 1]])
    bare = BaseModelOutput(last_hidden_state=hidden_states) if kind == "output" else (hidden_states,)
    states = as_prompt_states(bare, mask)
    assert states.last_hidden_state is hidden_states
    assert states.attention_mask is mask
    assert as_prompt_states(bare, None).attention_mask.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_each_tensor_of_a_prompt_is_repeated_for_its_beams() -> None:
    states = prompt_states(copies=3)
    assert states.copies == 3
    once, repeated = states.one_of_each(), states.one_for_each()
    assert once.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert once.last_hidden_state is states.last_hidden_state
    for name in ("last_hidden_state", "keys_of_prompt"):
        assert torch.equal(repeated[name], states[name].repeat_interleave(3, dim=0))
    assert torch.equal(repeated.attention_mask, states.attention_mask)
    assert states.copies == 3  # unchanged


def test_padding_moves_and_tokens_keep_their_order() -> None:
    mask, values = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]), torch.arange(8).view(2, 4)
    assert reorder(values, padding_to("left", mask)).tolist() == [[0, 2, 1, 3], [7, 4, 5, 6]]
    assert reorder(values, padding_to("right", mask)).tolist() == [[1, 3, 0, 2], [4, 5, 6, 7]]


def test_labels_are_padding_after_the_last_target_token_only() -> None:
    labels = torch.tensor([[5, -100, 6, -100], [5, 6, 7, 8], [-100, -100, -100, -100]])
    assert labels_mask(labels).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_positions_count_tokens_of_prompt_and_output_and_no_padding() -> None:
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask, positions = mask_and_positions(prompt_mask, None, 2, None)
    assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert positions.tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    cache = LLM2SLMCache(cache_of(4))  # the prompt and one output token
    cache.prompt_length = 3
    mask, positions = mask_and_positions(prompt_mask, None, 1, cache)
    assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert positions.tolist() == [[3], [4]]
    with pytest.raises(ValueError, match="`decoder_attention_mask` has width 1. Pass one of width 2"):
        mask_and_positions(prompt_mask, torch.ones(2, 1), 1, cache)
    with pytest.raises(ValueError, match="begins with a prompt of width 3, but this one has 4"):
        mask_and_positions(torch.ones(2, 4), None, 1, cache)


def test_the_cache_counts_output_tokens_only() -> None:
    cache = LLM2SLMCache(cache_of(5))
    cache.prompt_length = 3
    assert (cache.get_seq_length(), cache.get_max_length()) == (2, -1)
    check_continues(cache.get_seq_length(), 3)
    with pytest.raises(ValueError, match="holds 2 output tokens and `decoder_input_ids` has no more than 2"):
        check_continues(cache.get_seq_length(), 2)
    cache.reset()
    assert cache.prompt_length == 0


def test_an_empty_cache_of_any_class_is_wrapped_and_a_filled_one_refused() -> None:
    assert as_llm2slm_cache(None) is None
    empty = DynamicCache()
    for given in (empty, EncoderDecoderCache(empty, DynamicCache())):
        cache = as_llm2slm_cache(given)
        assert isinstance(cache, LLM2SLMCache)
        assert cache.self_attention_cache is empty
        assert as_llm2slm_cache(cache) is cache
    with pytest.raises(ValueError, match="tokens of another model"):
        as_llm2slm_cache(cache_of(1))


def test_a_static_cache_shorter_than_prompt_and_output() -> None:
    """If every layer has a sliding window (Mistral), the cache has its length."""
    torch.manual_seed(0)
    slm = MistralForCausalLM(MistralConfig(**families.GPT, **families.GROUPED, sliding_window=8)).eval()
    model = compose(families.build_llm("t5"), slm, "add").model
    learn_by_heart(model)
    model.eval()
    batch = pad_prompts(PROMPTS, "left")
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**batch, **options)
    check_outputs_vary(strip_padding(expected))
    assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), expected)
