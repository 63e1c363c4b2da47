"""Invariants over random models, prompts and padding: what may not change whatever the sizes are."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from tests.support.common import pad_prompts


Model = LLM2SLMForConditionalGeneration
EXAMPLES = int(os.environ.get("LLM2SLM_EXAMPLES", "500"))
LENGTH = 6
GREEDY = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
TOLERANCE = {"rtol": 1e-3, "atol": 2e-4}


class Case(NamedTuple):
    """A model and the prompts it is asked about."""

    model: Model
    prompts: list[list[int]]
    side: str
    extra: int


def llm_config(draw: Any, vocab_size: int) -> Any:
    layers, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    if draw(st.booleans()):
        return T5Config(
            vocab_size=vocab_size,
            d_model=heads * size,
            d_kv=size,
            d_ff=16,
            num_layers=layers,
            num_decoder_layers=1,
            num_heads=heads,
            feed_forward_proj=draw(st.sampled_from(["relu", "gated-gelu"])),
            tie_word_embeddings=draw(st.booleans()),
            pad_token_id=0,
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=heads * size,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=size,
        num_key_value_heads=1,
        pad_token_id=0,
        max_position_embeddings=64,
    )


def slm_config(draw: Any, vocab_size: int) -> Any:
    layers, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    end, tied = vocab_size - 1, draw(st.booleans())
    kind = draw(st.sampled_from(["gpt2", "llama", "t5"]))
    ids = {"vocab_size": vocab_size, "eos_token_id": end, "tie_word_embeddings": tied}
    if kind == "gpt2":
        return GPT2Config(
            **ids,
            n_embd=heads * size,
            n_layer=layers,
            n_head=heads,
            n_positions=64,
            bos_token_id=end,
            initializer_range=0.3,
        )
    if kind == "llama":
        return LlamaConfig(
            **ids,
            hidden_size=heads * size,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            head_dim=size,
            num_key_value_heads=1,
            bos_token_id=end,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    return T5Config(
        **ids,
        d_model=heads * size,
        d_kv=size,
        d_ff=16,
        num_layers=layers,
        num_decoder_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        dropout_rate=0.0,
        pad_token_id=end,
        decoder_start_token_id=end,
    )


@st.composite
def cases(draw: Any) -> Case:
    """A pair of random kinds, sizes, vocabularies, tying, fusion and layer; prompts of random lengths and padding."""
    shared = draw(st.booleans())
    vocab_size = draw(st.integers(20, 60))
    llm = llm_config(draw, vocab_size)
    slm = slm_config(draw, vocab_size if shared else draw(st.integers(20, 60)))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    llm_class = AutoModelForTextEncoding if llm.model_type == "t5" else None
    reader: PreTrainedModel = (
        llm_class.from_config(llm) if llm_class is not None else AutoModelForCausalLM.from_config(llm).model
    )
    writer = (AutoModelForSeq2SeqLM if slm.is_encoder_decoder else AutoModelForCausalLM).from_config(slm)
    model = Model.from_encoder_decoder_pretrained(
        encoder_model=reader.eval(),
        decoder_model=writer.eval(),
        fusion=draw(st.sampled_from(["add", "replace"])),
        shared_tokenizer=shared,
        encoder_layer=draw(st.sampled_from([None, llm.num_hidden_layers - 1])),
    )
    token = st.integers(1, min(vocab_size, slm.vocab_size) - 1)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=4))
    return Case(model, prompts, draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 4)))


def greedy(model: Model, prompts: list[list[int]], side: str = "right", extra: int = 0, **kwargs: Any) -> Any:
    return model.generate(
        **pad_prompts(prompts, side, extra), **GREEDY, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def same(first: Any, second: Any) -> None:
    """Equal logits up to precision, and equal tokens but where two were as good as each other."""
    for step, (ours, theirs) in enumerate(zip(first.logits, second.logits, strict=True)):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        for row in range(ours.shape[0]):
            if first.sequences[row, step + 1] != second.sequences[row, step + 1]:
                best = theirs[row].topk(2).values
                assert best[0] - best[1] < 1e-3, "a token changed that was better than every other"
                return  # from here on the two continue different outputs


def check_invariants(case: Case) -> None:
    model, prompts = case.model, case.prompts
    alone = [greedy(model, [prompt]) for prompt in prompts]
    batch = greedy(model, prompts, case.side, case.extra)

    for row, one in enumerate(alone):  # padding changes nothing
        of_row = copy.copy(batch)
        of_row.sequences, of_row.logits = (
            batch.sequences[row : row + 1],
            [step[row : row + 1] for step in batch.logits],
        )
        same(of_row, one)

    other = greedy(model, prompts[::-1], case.side, case.extra)  # nor does the order of a batch
    other.sequences, other.logits = other.sequences.flip(0), [step.flip(0) for step in other.logits]
    same(other, batch)

    for cache in ({"use_cache": False}, {"cache_implementation": "static"}):  # nor the cache
        same(greedy(model, prompts, case.side, case.extra, **cache), batch)

    twice = greedy(model, prompts, case.side, case.extra, num_beams=1)  # nor how many sequences are returned
    many = model.generate(**pad_prompts(prompts, case.side, case.extra), **GREEDY, num_beams=3, num_return_sequences=3)
    few = model.generate(**pad_prompts(prompts, case.side, case.extra), **GREEDY, num_beams=3)
    assert many[::3].tolist() == few.tolist()
    same(twice, batch)

    with tempfile.TemporaryDirectory() as folder:  # nor saving and loading
        model.save_pretrained(folder)
        same(greedy(Model.from_pretrained(folder), prompts, case.side, case.extra), batch)

    check_gradients(model, prompts)


def check_gradients(model: Model, prompts: list[list[int]]) -> None:
    """Only projector, prompt embedding and SLM ever receive a gradient, and each of the first two does."""
    model.train()
    labels = torch.full((len(prompts), 3), 5)
    model(**pad_prompts(prompts), labels=labels).loss.backward()
    touched = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert not [name for name in touched if name.startswith("encoder.llm.")]
    assert "encoder.projector.linear_1.weight" in touched
    assert (model.encoder.prompt_embedding is None) or "encoder.prompt_embedding.weight" in touched
    assert any(name.startswith("decoder.") for name in touched)


COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}


@seed(0)
@settings(max_examples=8, phases=[Phase.generate], **COMMON)
@given(case=cases())
def test_invariants_of_a_few_models(case: Case) -> None:
    check_invariants(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=EXAMPLES, **COMMON)
@given(case=cases())
def test_invariants(case: Case) -> None:
    check_invariants(case)
