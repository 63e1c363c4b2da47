"""Every family of SLM with both kinds of LLM: stock `generate()` in every corner, against a slow reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import families
import pytest
import torch
from transformers import StaticCache, T5ForConditionalGeneration

from common import (
    FUSIONS,
    PROMPTS,
    SLM_VOCAB_SIZE,
    Parts,
    SlowReference,
    check_answers_say_something,
    count_calls,
    pad_prompts,
    shared_family,
    strip_padding,
)


LENGTH = 12  # new tokens
SEED = 7

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "return_sequences": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "off": {"use_cache": False},
}
ASSISTED = ("prompt_lookup", "composite", "plain")
PADDINGS = ("alone", "left", "right")

PAIRS = list(itertools.product(families.SLMS, ("t5", "llama"), FUSIONS))
# The fast tests take one of the six for each SLM, such that every LLM and fusion meets many SLMs.
FAST = [pair for index, pair in enumerate(PAIRS) if index % 6 == (index // 6) % 6]
GRID = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow, id="-".join(pair)) for pair in PAIRS]


def caches(slm: str) -> list[str]:
    """The caches that work in transformers: its GPT-Neo has other answers with a static one."""
    return [cache for cache in CACHES if (slm, cache) != ("gpt_neo", "static")]


@functools.cache
def expected(pair: tuple[str, str, str], strategy: str, row: int | None = None) -> Any:
    """What the slow reference answers to all prompts, or to one."""
    torch.manual_seed(SEED)
    reference = SlowReference(shared_family(*pair), PROMPTS if row is None else [PROMPTS[row]])
    kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True}
    return reference.answer(**STRATEGIES[strategy], **kwargs)


def prompt_of(parts: Parts, prompts: list[list[int]], padding: str, passed: bool) -> dict[str, Any]:
    """Prompts as ids or as states computed before; padded by four more than they need, but for those alone."""
    batch = pad_prompts(prompts, side=padding, extra=0 if padding == "alone" else 4)
    return {"encoder_outputs": parts.model.encode_prompt(**batch)} if passed else batch


def check(parts: Parts, actual: Any, wanted: Any) -> None:
    """Equal tokens, and equal logits up to float32's precision."""
    assert actual.sequences.tolist() == wanted.sequences.tolist()
    first, second = torch.cat(actual.logits), torch.cat(wanted.logits)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(second.std()))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("llm", ["t5", "llama"])
@pytest.mark.parametrize("slm", families.SLMS)
def test_answers_are_varied_and_differ_between_prompts(slm: str, llm: str, fusion: str) -> None:
    """Without this, equality below would prove nothing."""
    check_answers_say_something(strip_padding(expected((slm, llm, fusion), "greedy").sequences))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("slm", "llm", "fusion"), GRID)
def test_parity(slm: str, llm: str, fusion: str, strategy: str) -> None:
    """Any cache, any padding, computed or passed states: the slow reference's tokens and logits."""
    pair = (slm, llm, fusion)
    parts = shared_family(*pair)
    for padding, passed, cache in itertools.product(PADDINGS, (False, True), caches(slm)):
        prompts = PROMPTS[:1] if padding == "alone" else PROMPTS
        wanted = expected(pair, strategy, 0 if padding == "alone" else None)
        batch = prompt_of(parts, prompts, padding, passed)
        torch.manual_seed(SEED)
        kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True}
        check(parts, parts.model.generate(**batch, **kwargs, **STRATEGIES[strategy], **CACHES[cache]), wanted)


def assistants(parts: Parts, kind: str, pair: tuple[str, str, str]) -> dict[str, Any]:
    if kind == "prompt_lookup":
        return {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if kind == "composite":
        return {"assistant_model": shared_family(pair[0], pair[1], "replace" if pair[2] == "add" else "add").model}
    torch.manual_seed(3)
    config = families.SLMS["flan_t5"].config()  # stock sizes caches of a T5 by its encoder: that has to be the deeper
    assert config.vocab_size == SLM_VOCAB_SIZE
    return {"assistant_model": T5ForConditionalGeneration(config).eval()}


@pytest.mark.parametrize("kind", ASSISTED)
@pytest.mark.parametrize(("slm", "llm", "fusion"), GRID)
def test_assisted(slm: str, llm: str, fusion: str, kind: str) -> None:
    """Prompt lookup, and an assistant that is another composite or a plain encoder-decoder: the greedy answer."""
    pair = (slm, llm, fusion)
    parts = shared_family(*pair)
    for padding, passed in itertools.product(PADDINGS, (False, True)):
        if passed and kind != "prompt_lookup":
            continue  # stock assisted generation runs the assistant's own encoder over token ids
        wanted = expected(pair, "greedy", 0)
        batch = prompt_of(parts, PROMPTS[:1], padding, passed)
        kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True}
        check(parts, parts.model.generate(**batch, do_sample=False, **kwargs, **assistants(parts, kind, pair)), wanted)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("slm", families.SLMS)
def test_each_encoder_runs_once(slm: str, strategy: str) -> None:
    parts = shared_family(slm)
    with count_calls(parts.model.encoder.llm) as llm_calls:
        if parts.slm.config.is_encoder_decoder:
            with count_calls(parts.model.decoder.get_encoder()) as calls:
                parts.model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, **STRATEGIES[strategy])
            assert len(calls) == 1
        else:
            parts.model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, **STRATEGIES[strategy])
    assert len(llm_calls) == 1


def test_a_static_cache_that_transformers_gets_wrong_is_refused() -> None:
    model = shared_family("gpt_neo").model
    cache = StaticCache(config=model.config.decoder, max_cache_len=40)
    for kwargs in (CACHES["static"], {"past_key_values": cache}):
        with pytest.raises(ValueError, match="static cache is not supported"):
            model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, **kwargs)
