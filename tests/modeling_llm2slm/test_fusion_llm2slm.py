"""Fusions: a new one is one class, which may come from outside the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from modeling_llm2slm import (
    Fusion,
    LLM2SLMConfig,
    LLM2SLMForConditionalGeneration,
    PromptStates,
    ia3_config,
    lora_config,
    register_fusion,
)
from modeling_llm2slm.engines.graphs import PromptGraph, graphs_of
from modeling_llm2slm.fusion_llm2slm import Replace
from modeling_llm2slm.inference.model_card import model_card
from modeling_llm2slm.states.without_llm import load_without_llm
from tests.support import families
from tests.support.common import PROMPTS, gpt2_config, make_labels, pad_prompts, same_tensors, t5_config


@register_fusion
class Gated(Fusion):
    """P = g(x) W H: a linear map of the hidden states, with a gate computed from the LLM's embedding of each token."""

    name = "gated"
    description = "reads a gated linear map of the hidden states of the LLM"

    @property
    def table(self) -> str:
        return "llm"

    def add_modules(self, encoder: Any) -> None:
        encoder.map = nn.Linear(self.config.llm_hidden_size, self.config.prompt_size)
        encoder.gate = nn.Linear(encoder.llm.get_input_embeddings().embedding_dim, 1)

    def combine(self, encoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        return encoder.gate(embeds).sigmoid() * encoder.map(hidden_states)

    def initialize(self, encoder: Any) -> None:
        nn.init.normal_(encoder.map.weight, std=0.5)


def build(slm: str = "gpt2", fusion: str = "gated") -> LLM2SLMForConditionalGeneration:
    torch.manual_seed(0)
    return LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=families.build_llm("t5"), decoder_model=families.build_slm(slm), fusion=fusion
    )


@pytest.mark.parametrize("slm", ["gpt2", "t5"])
def test_a_fusion_from_outside_trains_generates_saves_and_loads(slm, tmp_path):
    model, batch = build(slm), pad_prompts(PROMPTS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([weight for weight in model.train().parameters() if weight.requires_grad], lr=0.1)
    model(**batch, labels=make_labels()).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"encoder.map.weight", "encoder.map.bias", "encoder.gate.weight", "encoder.gate.bias"} <= changed
    assert not any(name.startswith("encoder.llm.") for name in changed)
    model.eval()
    expected = model.generate(**batch, num_beams=2, max_new_tokens=6)
    model.save_pretrained(tmp_path / "model")
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.generate(**batch, num_beams=2, max_new_tokens=6), expected)


def test_padding_does_not_change_what_a_fusion_from_outside_gives():
    model = build()
    together = model.encode_prompt(**pad_prompts(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone = model.encode_prompt(**pad_prompts([prompt])).last_hidden_state[0]
        torch.testing.assert_close(together.last_hidden_state[row, -len(prompt) :], alone, rtol=1e-4, atol=1e-5)


def test_training_export_and_model_card_support_a_registered_fusion(tmp_path):
    """A model without its LLM, adapters, the model card and exported graphs work with a fusion that they never saw."""
    model, batch = build(), pad_prompts(PROMPTS)
    states = model.encode_llm(**batch)
    expected = model.generate(**batch, max_new_tokens=6)
    model.save_pretrained(tmp_path / "model")
    without_llm = load_without_llm(tmp_path / "model")
    assert not any("block" in name for name in without_llm.encoder.state_dict())
    assert torch.equal(without_llm.generate(**batch, llm_hidden_states=states, max_new_tokens=6), expected)
    assert lora_config(model).modules_to_save == ["map", "gate"]
    assert ia3_config(model).modules_to_save == ["map", "gate"]
    assert Gated.description in str(model_card(model, "model"))
    graph = PromptGraph(model)
    assert set(graph.sample()) == {"input_ids", "attention_mask"}
    prompt = pad_prompts(PROMPTS[:1])
    torch.testing.assert_close(
        graph(**prompt)["last_hidden_state"], model.encode_prompt(**prompt).last_hidden_state, rtol=1e-4, atol=1e-5
    )


def test_weights_of_a_registered_fusion_that_were_saved_are_kept(tmp_path):
    """Its `initialize` writes to all of its weights, and a checkpoint may hold some of them."""
    saved = build()
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.encoder.map.weight, saved.encoder.map.weight)
    del tensors["encoder.map.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert 0.45 < loaded.encoder.map.weight.std() < 0.55


@dataclass
class GatedStates(PromptStates):
    """Prompt states with a gate for each of them."""

    gate: torch.Tensor = None  # type: ignore[assignment]


@register_fusion
class GatedLater(Replace):
    """P = Z, which the SLM reads through a gate that was computed with the prompt."""

    name = "gated_later"

    def read_prompt(self, *args: Any, **kwargs: Any) -> PromptStates:
        states = super().read_prompt(*args, **kwargs)
        gate = states.last_hidden_state.mean(dim=(1, 2), keepdim=True).sigmoid()
        return GatedStates(**states, gate=gate)

    def prepend(self, prompt: Any, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        gated = replace(prompt, last_hidden_state=prompt.last_hidden_state * prompt.gate)
        return super().prepend(gated, embeds, cache)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "cache_implementation": "static"}])
def test_a_fusion_may_hand_over_further_tensors(options):
    """Beams, given prompts and every kind of cache keep the fields of a subclass of `PromptStates`."""
    model, batch = build(fusion="gated_later"), pad_prompts(PROMPTS)
    prompt = model.encode_prompt(**batch)
    before = {name: tensor.clone() for name, tensor in prompt.items()}
    assert isinstance(prompt, GatedStates)
    expected = model.generate(**batch, max_new_tokens=6, **options)
    assert torch.equal(model.generate(encoder_outputs=prompt, max_new_tokens=6, **options), expected)
    same_tensors(dict(prompt), before)
    logits = model(encoder_outputs=prompt, decoder_input_ids=expected).logits
    torch.testing.assert_close(model(**batch, decoder_input_ids=expected).logits, logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_each_beam_reads_the_further_tensors_of_its_own_prompt(options):
    model = build(fusion="gated_later")
    together = model.generate(**pad_prompts(PROMPTS), num_beams=2, max_new_tokens=6, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(**pad_prompts([prompt]), num_beams=2, max_new_tokens=6, **options)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_a_fusion_that_hands_over_more_than_embeddings_is_not_exported():
    with pytest.raises(ValueError, match=r'`fusion="gated_later"` overrides `read_prompt`, but exported graphs'):
        graphs_of(build(fusion="gated_later"))


def test_an_unknown_fusion_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`fusion` is 'sum', but it must be one of 'add', 'replace'"):
        LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(), fusion="sum")
