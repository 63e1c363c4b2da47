"""A model without its LLM has the same losses, gradients and outputs, and does not load the LLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
)

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.parts import composite_parts
from modeling_llm2slm.reserving import ReservingLayer
from modeling_llm2slm.states.without_llm import load_without_llm, with_llm
from tests.support.common import (
    FUSIONS,
    PROMPTS,
    build_model,
    gpt2_config,
    make_labels,
    pad_prompts,
    same_tensors,
    t5_config,
)
from tests.support.families import CAUSAL, LLM, LLMS, partial


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_loss_gradients_and_outputs_equal_the_whole_models(fusion: str, dtype: str | None, tmp_path: Path) -> None:
    built = build_model(fusion)
    if dtype is not None:
        built.config.encoder_dtype = dtype
        built.encoder.llm.to(torch.bfloat16)
    built.save_pretrained(tmp_path)
    whole = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    model, report = load_without_llm(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    of_llm = [name for name, _ in model.named_parameters() if ".llm." in name]
    assert of_llm == (["encoder.llm.shared.weight"] if fusion == "add" else [])

    batch = pad_prompts(PROMPTS)
    states = whole.encode_llm(**batch)
    losses = []
    for each in (whole, model):
        loss = each.eval()(**batch, labels=make_labels(), llm_hidden_states=states).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if ".llm." not in name:
            assert torch.equal(parameter.grad, expected[name].grad), name
    outputs = [each.generate(**batch, llm_hidden_states=states, max_new_tokens=6) for each in (whole, model)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_llm_does_not_train_and_with_llm_restores_the_whole_model(fusion: str, tmp_path: Path) -> None:
    built = build_model(fusion)
    built.save_pretrained(tmp_path)
    model = load_without_llm(tmp_path).train()
    assert not [name for name, p in model.named_parameters() if ".llm." in name and p.requires_grad]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = with_llm(model, tmp_path)
    assert type(whole) is LLM2SLMForConditionalGeneration
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, built.state_dict()[name] + int(name in trained))
    whole.save_pretrained(tmp_path / "whole")
    same_tensors(LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict(), whole.state_dict())


def test_it_has_parts_and_the_cache_of_the_whole_model(tmp_path: Path) -> None:
    build_model("replace").save_pretrained(tmp_path)
    model = load_without_llm(tmp_path)
    parts = {part.name: (part.parameters, part.dtype) for part in composite_parts(model)}
    assert parts["LLM"] == (0, "float32")
    assert parts["SLM"] == (model.decoder.num_parameters(), "float32")
    output = model.generate(
        attention_mask=torch.ones(1, 3).long(),
        llm_hidden_states=torch.zeros(1, 3, model.config.llm_hidden_size),
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert {type(layer) for layer in output.past_key_values.self_attention_cache.layers} == {ReservingLayer}
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "new", False)


def test_a_prompt_without_hidden_states_is_an_error_that_names_the_fix(tmp_path: Path) -> None:
    build_model("add").save_pretrained(tmp_path)
    model = load_without_llm(tmp_path)
    for call in (model, model.generate, model.encode_llm):
        labels = {"labels": make_labels()} if call is model else {}
        with pytest.raises(ValueError, match="loaded without its LLM: pass `llm_hidden_states`"):
            call(**pad_prompts(PROMPTS), **labels)


# Families whose embeddings or weights are initialized in ways of their own, besides those of `LLMS`.
MORE_LLMS = {
    "gemma": partial(GemmaConfig, CAUSAL),
    "gemma2": partial(Gemma2Config, CAUSAL, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": partial(Gemma3TextConfig, CAUSAL, sliding_window=8, query_pre_attn_scalar=8),
    "mistral": partial(MistralConfig, CAUSAL),
    "phi": partial(PhiConfig, CAUSAL, num_key_value_heads=4),
    "opt": partial(OPTConfig, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0,
                   word_embed_proj_dim=32),
    "gpt_neox": partial(GPTNeoXConfig, CAUSAL),
}  # fmt: skip
ALL_LLMS = LLMS | {name: LLM(name, name, config, layer=2) for name, config in MORE_LLMS.items()}


@pytest.mark.parametrize("family", ALL_LLMS)
def test_every_family_of_llms_keeps_its_embedding(family: str, tmp_path: Path) -> None:
    """Some families scale their embeddings by a number that no checkpoint holds."""
    llm = ALL_LLMS[family]
    config = LLM2SLMConfig(encoder=llm.config(vocab_size=120), decoder=gpt2_config(), encoder_layer=llm.layer)
    LLM2SLMForConditionalGeneration(config).save_pretrained(tmp_path)
    whole = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    model, report = load_without_llm(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    of_llm = [parameter.numel() for name, parameter in model.named_parameters() if ".llm." in name]
    assert of_llm == [whole.encoder.llm.get_input_embeddings().weight.numel()]
    # accelerate shards by these classes, and raises an error for a class that is not in the model.
    assert all(get_module_class_from_name(each, name) for each in (whole, model) for name in each._no_split_modules)
    assert "GPT2Block" in model._no_split_modules <= whole._no_split_modules
    batch = pad_prompts(PROMPTS)
    states = whole.encode_llm(**batch)
    stored = {**batch, "llm_hidden_states": states, "labels": make_labels()}
    losses = [each.eval()(**stored).loss for each in (whole, model)]
    assert torch.equal(*losses)
    assert torch.equal(with_llm(model, tmp_path)(**batch, labels=make_labels()).loss, losses[0])


def test_a_truncated_llm_and_an_encoder_decoder_slm(tmp_path: Path) -> None:
    config = LLM2SLMConfig(encoder=t5_config(), decoder=t5_config(), encoder_layer=2)
    whole = LLM2SLMForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model = load_without_llm(tmp_path)
    batch = pad_prompts(PROMPTS)
    states = whole.encode_llm(**batch)
    labels = make_labels()
    assert torch.equal(
        model(**batch, llm_hidden_states=states, labels=labels).loss, whole(**batch, labels=labels).loss
    )


def test_its_former_module_can_be_imported() -> None:
    from modeling_llm2slm.without_llm import load_without_llm as former

    assert former is load_without_llm
