"""An LLM-to-SLM model that drafts for its own LLM gives the LLM's greedy output and runs its encoder once."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, GPT2LMHeadModel, T5EncoderModel

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from tests.support import families
from tests.support.common import (
    PROMPTS,
    build_family,
    compose,
    count_calls,
    gpt2_config,
    learn_by_heart,
    pad_prompts,
)
from tests.support.families import LLM_VOCAB_SIZE, LLMS, PAD, move_vectors


LENGTH = 14
SLMS = ("gpt2", "t5", "deep_t5")


@functools.cache
def whole_llm(family: str = "t5", **overrides: Any) -> Any:
    """An encoder-decoder with its decoder, whose outputs vary."""
    torch.manual_seed(4)
    config = LLMS[family].config(vocab_size=LLM_VOCAB_SIZE, **overrides)
    config.decoder_start_token_id = PAD
    if config.model_type == "t5":  # stock sizes the caches of a T5 by its encoder
        config.num_decoder_layers = config.num_layers
    llm = move_vectors(AutoModelForSeq2SeqLM.from_config(config).eval())
    llm.generation_config.forced_eos_token_id = None
    if not overrides:
        learn_by_heart(llm)
    return llm


@functools.cache
def draft_model(llm: Any, slm: str = "t5", teach: bool = True) -> LLM2SLMForConditionalGeneration:
    """A composite on the encoder of `llm`, with the LLM's vocabulary and start token, trained on the LLM's outputs."""
    torch.manual_seed(6)
    if slm == "gpt2":
        small = GPT2LMHeadModel(gpt2_config(vocab_size=LLM_VOCAB_SIZE, bos_token_id=PAD, eos_token_id=1))
    else:
        layers = {"num_layers": 1, "num_decoder_layers": 3 if slm == "deep_t5" else 1}
        small = AutoModelForSeq2SeqLM.from_config(LLMS["t5"].config(vocab_size=LLM_VOCAB_SIZE, **layers))
    encoder = llm.model if llm.config.model_type == "bart" else T5EncoderModel(copy.deepcopy(llm.config)).eval()
    if llm.config.model_type != "bart":
        encoder.load_state_dict(llm.state_dict(), strict=False)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=encoder, decoder_model=small.eval(), shared_tokenizer=True
    )
    if teach:
        sequences = llm.generate(**pad_prompts(PROMPTS), max_new_tokens=LENGTH, do_sample=False)[:, 1:]
        learn_by_heart(model, labels=sequences.masked_fill(sequences == PAD, -100))
    return model


@pytest.mark.parametrize("padding", ["alone", "left", "right"])
@pytest.mark.parametrize("teach", [True, False], ids=["good", "poor"])
@pytest.mark.parametrize("slm", SLMS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_assisted_output_equals_the_llms_own(family: str, slm: str, teach: bool, padding: str) -> None:
    """Whatever is drafted; and a good draft saves steps of the LLM's decoder."""
    llm = whole_llm(family)
    assistant = draft_model(llm, slm, teach).as_assistant_of(llm)
    extra = 0 if padding == "alone" else 3
    distinct, steps, tokens = set(), 0, 0
    for prompt in PROMPTS:
        batch = pad_prompts([prompt], padding, extra)
        wanted = llm.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
        with count_calls(llm.get_encoder()) as encoded, count_calls(llm.get_decoder()) as decoded:
            sequence = llm.generate(**batch, max_new_tokens=LENGTH, do_sample=False, assistant_model=assistant)
        assert sequence.tolist() == wanted.tolist()
        assert len(encoded) == 1
        distinct.add(tuple(wanted[0].tolist()))
        steps, tokens = steps + len(decoded), tokens + wanted.shape[1] - 1
    assert len(distinct) == len(PROMPTS)
    if teach:
        assert steps < 0.7 * tokens


@pytest.mark.parametrize("slm", SLMS)
def test_a_draft_continued_from_its_cache_equals_one_from_scratch(slm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds tokens twice would change no output, but would make drafts after the first useless."""
    llm = whole_llm()
    assistant = draft_model(llm, slm, teach=False).as_assistant_of(llm)
    batch, own, drafts = pad_prompts(PROMPTS[:1]), assistant.generate, []

    def generate(**kwargs: Any) -> Any:
        output = own(**kwargs)
        drafts.append((kwargs["decoder_input_ids"].clone(), output.sequences))
        return output

    monkeypatch.setattr(assistant, "generate", generate)
    llm.generate(**batch, max_new_tokens=LENGTH, do_sample=False, assistant_model=assistant)
    assert len(drafts) > 2
    for given, drafted in drafts:
        length = drafted.shape[1] - given.shape[1]
        assert own(**batch, decoder_input_ids=given, max_new_tokens=length, do_sample=False).equal(drafted)


def test_weights_are_shared_and_the_model_stays_as_it_was() -> None:
    llm = whole_llm()
    model = draft_model(llm, teach=False)
    own, config = model.encoder.llm, model.generation_config
    assistant = model.as_assistant_of(llm)
    assert assistant.encoder.llm is llm.get_encoder()
    assert assistant.decoder is model.decoder
    assert assistant.encoder.projector is model.encoder.projector
    assert model.encoder.llm is own
    assert not hasattr(model.encoder, "recent")
    assistant.generation_config.num_assistant_tokens = 3  # its own
    assert config.num_assistant_tokens != 3
    batch = pad_prompts(PROMPTS)
    kwargs = {"max_new_tokens": LENGTH, "do_sample": False}
    assert assistant.generate(**batch, **kwargs).tolist() == model.generate(**batch, **kwargs).tolist()


def test_hidden_states_of_another_prompt_are_never_used() -> None:
    """Only those of the very ids and mask, and only while the LLM's own `generate()` holds them."""
    llm = whole_llm()
    assistant = draft_model(llm, teach=False).as_assistant_of(llm)
    batch = pad_prompts(PROMPTS)
    recent, mask = assistant.encoder.recent, batch["attention_mask"]
    ids = batch["input_ids"]
    read = functools.partial(llm.get_encoder(), **batch)
    states = read()
    assert recent.find(ids, mask) is states[0]
    assert recent.find(ids, mask) is None  # once
    for others in ((ids.flip(0), mask), (ids, torch.ones_like(mask)), (ids[:1], mask[:1])):
        states = read()
        assert recent.find(*others) is None
    states, before = read(), ids.clone()
    ids.copy_(ids.flip(0))
    assert recent.find(ids, mask) is None
    ids.copy_(before)
    states, found = read(), []
    thread = threading.Thread(target=lambda: found.append(recent.find(ids, mask)))
    thread.start()
    thread.join()
    assert found == [None]
    del states
    assert recent.find(ids, mask) is None


def test_the_callers_llm_stays_unchanged() -> None:
    """Its modes and gradients, and that it can be copied."""
    llm = copy.deepcopy(whole_llm())
    assistant = draft_model(whole_llm(), teach=False).as_assistant_of(llm)
    llm.train()
    assistant.eval()
    assert llm.get_encoder().training
    assert all(weight.requires_grad for weight in llm.parameters())
    llm.eval()
    assistant.train()
    assert not llm.get_encoder().training
    copied = copy.deepcopy(llm)
    batch = pad_prompts(PROMPTS[:1])
    assert copied.generate(**batch, max_new_tokens=4).tolist() == llm.generate(**batch, max_new_tokens=4).tolist()


def test_the_llm_forgets_a_deleted_assistant() -> None:
    llm = whole_llm()
    model = draft_model(llm, teach=False)
    assistant = model.as_assistant_of(llm)
    hooks = len(llm.get_encoder()._forward_hooks)
    assert hooks > 0
    del assistant
    gc.collect()
    assert len(llm.get_encoder()._forward_hooks) < hooks


def test_errors_name_the_fix() -> None:
    llm = whole_llm()
    model = draft_model(llm, teach=False)
    with pytest.raises(ValueError, match="no decoder. Pass the whole LLM"):
        model.as_assistant_of(build_family("gpt2").slm)
    with pytest.raises(ValueError, match="different tokenizers"):
        build_family("t5").model.as_assistant_of(llm)
    with pytest.raises(ValueError, match="another LLM"):
        model.as_assistant_of(whole_llm(d_model=24))
    with pytest.raises(ValueError, match="`vocab_size` is 99, but the LLM's is 120"):
        build_family("t5", fusion="add_shared").model.as_assistant_of(llm)
    llm = copy.copy(llm)
    llm.generation_config = copy.deepcopy(llm.generation_config)
    llm.generation_config.decoder_start_token_id = 5
    with pytest.raises(ValueError, match="`decoder_start_token_id` is 0, but the LLM's is 5"):
        model.as_assistant_of(llm)
    cut = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=T5EncoderModel(copy.deepcopy(llm.config)),
        decoder_model=model.decoder,
        shared_tokenizer=True,
        encoder_layer=1,
    )
    with pytest.raises(ValueError, match="middle layer"):
        cut.as_assistant_of(llm)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", families.SHARING)
def test_a_model_of_fusion_cache_drafts_for_its_decoder_only_llm(family: str, first: bool) -> None:
    """Exactly the LLM's own output, whatever is accepted of the drafts; the LLM's weights are there once."""
    llm = families.build_whole(family, bos_token_id=2, eos_token_id=97)
    reader = copy.deepcopy(llm if first else llm.base_model)
    model = compose(reader, families.build_slm(family), "cache", llm_first_token=first).model
    assistant = model.as_assistant_of(llm)
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    with count_calls(model.decoder.get_output_embeddings()) as calls:
        for prompt in PROMPTS:
            batch = pad_prompts([prompt], "left", extra=2)
            drafted = llm.generate(**batch, assistant_model=assistant, **kwargs)
            assert drafted.tolist() == llm.generate(**batch, **kwargs).tolist()
    assert calls
    plain = assistant.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
    wanted = model.generate(**batch, **kwargs, eos_token_id=assistant.generation_config.eos_token_id)[:, 1:]
    assert plain.tolist() == wanted.tolist()


def test_no_other_model_drafts_for_a_decoder_only_llm() -> None:
    llm = families.build_whole("llama")
    model = compose(copy.deepcopy(llm), families.build_slm("llama"), "cache").model
    with pytest.raises(ValueError, match="is another LLM than the one in the model"):
        model.as_assistant_of(move_vectors_far(copy.deepcopy(llm)))
    for other in (llm.base_model, families.build_whole("qwen3")):
        with pytest.raises(ValueError, match="has no decoder. Pass the whole LLM"):
            model.as_assistant_of(other)


def move_vectors_far(llm: Any) -> Any:
    torch.nn.init.normal_(llm.get_input_embeddings().weight)
    return llm
