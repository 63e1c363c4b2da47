"""Fusions: a new one is one class, which may come from outside the package."""

from __future__ import annotations

import copy
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
from modeling_llm2slm.files_llm2slm import open_weights, weight_files
from modeling_llm2slm.fusion_llm2slm import Replace
from modeling_llm2slm.inference.model_card import model_card
from modeling_llm2slm.states.without_llm import load_without_llm
from tests.support import families
from tests.support.common import (
    PROMPTS,
    compose,
    count_calls,
    gpt2_config,
    make_labels,
    pad_prompts,
    same_tensors,
    t5_config,
)
from tests.support.families import END, SLM_VOCAB_SIZE


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


# Fusion "cache": an SLM of all layers of its LLM, with the same weights, is the LLM.


def build_twin(family: str, first: bool = True, **config: Any) -> Any:
    """A model whose SLM is its LLM."""
    llm = families.build_whole(family, bos_token_id=2, eos_token_id=1)
    given = copy.deepcopy(llm) if first else copy.deepcopy(llm.base_model)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=given, decoder_model=copy.deepcopy(llm), fusion="cache", shared_tokenizer=True,
        decoder_layers=[0, 1, 2], llm_first_token=first, **config,
    )  # fmt: skip
    return model, llm


def build_cache_model(family: str = "gemma3", **config: Any) -> LLM2SLMForConditionalGeneration:
    """A model whose SLM shares two of the three layers of its LLM."""
    return compose(families.build_whole(family), families.build_slm(family), "cache", **config).model


def continued(llm: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """What the LLM generates after each prompt alone, without padding."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        outputs += llm.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, len(prompt) :].tolist()
    return [output[: output.index(1) + 1] if 1 in output else output for output in outputs]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", families.SHARING)
def test_an_slm_of_all_layers_is_the_llm(family: str, first: bool, side: str) -> None:
    """Padded prompts, one of them a single token, and one longer than Gemma's sliding window."""
    model, llm = build_twin(family, first)
    prompts = [*PROMPTS, [9]]
    batch = pad_prompts(prompts, side)
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [1, -100, -100, -100], [3, 4, 1, -100]])
    outputs, losses = model(**batch, labels=labels), []
    for row, prompt in enumerate(prompts):
        target = labels[row][labels[row] != -100]
        with torch.no_grad():
            logits = llm(torch.tensor([prompt + target.tolist()])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(outputs.logits[row, : len(target)].detach(), logits, rtol=1e-3, atol=1e-4)
        losses.append(nn.functional.cross_entropy(logits, target, reduction="none")[int(first) :])
    torch.testing.assert_close(outputs.loss.detach(), torch.cat(losses).mean(), rtol=1e-4, atol=1e-4)
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        kwargs = {"max_new_tokens": 10, "do_sample": False, **options}
        wanted = continued(llm, prompts, **kwargs)
        assert strip(model.generate(**batch, **kwargs)) == wanted
        prompt = model.encode_prompt(**batch)
        assert strip(model.generate(encoder_outputs=prompt, **kwargs)) == wanted


def strip(sequences: torch.Tensor) -> list[list[int]]:
    return [row[: row.index(1) + 1] if 1 in row else row for row in sequences[:, 1:].tolist()]


@pytest.mark.parametrize("first", [True, False])
def test_prompt_and_output_use_every_position_of_the_llm(first: bool) -> None:
    model, llm = build_twin("gpt2", first)
    prompt = [(13 * index + 5) % 90 + 3 for index in range(50)]
    kwargs = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False}
    wanted = llm.generate(torch.tensor([prompt]), **kwargs)[:, 50:].tolist()
    assert model.generate(torch.tensor([prompt]), **kwargs)[:, 1:].tolist() == wanted
    with pytest.raises(ValueError, match="but the SLM has 64 positions"):
        model.generate(torch.tensor([prompt]), max_new_tokens=16)


def test_the_llm_runs_once_and_the_slm_computes_output_tokens_only() -> None:
    model, batch, read = build_cache_model(), pad_prompts(PROMPTS), []
    model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    with count_calls(model.encoder.llm) as calls:
        model.generate(**batch, num_beams=2, max_new_tokens=4, min_new_tokens=4)
    assert len(calls) == 1
    assert read == [(6, 1, 32)] * 3
    model(**batch, labels=make_labels())
    assert read[-1] == (3, 5, 32)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_stored_keys_and_values_train_the_slm_alone(first: bool, dtype: str | None, tmp_path) -> None:
    """Same loss and gradients as the whole model; the first token of an output needs the LLM or the SLM's own."""
    llm = families.build_whole("gemma3")
    llm = (llm if first else llm.base_model).to(torch.bfloat16 if dtype else torch.float32)
    model = compose(llm, families.build_slm("gemma3"), "cache", llm_first_token=first).model
    batch, labels = pad_prompts(PROMPTS), make_labels()
    states = model.encode_llm(**batch)
    assert states.shape == (3, 12, 2 * 2 * 2 * 8) == (*batch["input_ids"].shape, model.config.llm_hidden_size)
    model.save_pretrained(tmp_path)
    alone, report = load_without_llm(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not [name for name, _ in alone.named_parameters() if ".llm." in name]
    losses, kept = [], {**batch, "labels": labels, "llm_hidden_states": states}
    for each, inputs in ((model, {**batch, "labels": labels}), (model, kept), (alone.train(), kept)):
        each.zero_grad()
        loss = each(**inputs).loss
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses)) == 1
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if ".llm." not in name}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    assert not any(parameter.grad is not None for parameter in model.encoder.llm.parameters())
    inputs = {**batch, "llm_hidden_states": states, "max_new_tokens": 6}
    expected = model.eval().generate(**batch, max_new_tokens=6)
    if not first:
        assert torch.equal(alone.eval().generate(**inputs), expected)
        return
    with pytest.raises(ValueError, match="first output token comes from the LLM's logits, which stored hidden states"):
        alone.eval().generate(**inputs)
    assert torch.equal(alone.generate(**inputs, decoder_input_ids=expected[:, :2])[:, : expected.shape[1]], expected)
    assert not alone(**kept).logits[:, 0].any()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", ["smollm", "llama"])
def test_checkpoints_of_fusion_cache(family: str, first: bool, tmp_path) -> None:
    """Full and lean, with a tied and an untied head; the LLM is cut after the last layer that the SLM shares."""
    llm = families.build_whole(family)
    llm.save_pretrained(tmp_path / "llm")
    families.build_slm(family).save_pretrained(tmp_path / "slm")
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        tmp_path / "llm", tmp_path / "slm", fusion="cache", shared_tokenizer=True, decoder_layers=[0, 1],
        llm_first_token=first,
    )  # fmt: skip
    assert len(model.encoder.llm.base_model.layers) == (3 if first else 2)
    batch = pad_prompts(PROMPTS)
    expected = model.generate(**batch, max_new_tokens=6)
    for name, options in (("full", {}), ("lean", {"include_llm": False})):
        model.save_pretrained(tmp_path / name, **options)
        loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(loaded.generate(**batch, max_new_tokens=6), expected)
        assert loaded.config.decoder_layers == [0, 1]
    names = open_weights(weight_files(tmp_path / "lean", on_hub=False)).keys()
    assert all(name.startswith("decoder.") for name in names)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_fusion_cache_train_the_slm() -> None:
    from peft import get_peft_model

    model, batch = build_cache_model("llama"), pad_prompts(PROMPTS)
    adapted = get_peft_model(model, lora_config(model))
    adapted(**batch, labels=make_labels()).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all(".decoder." in name for name in trained)
    assert adapted.generate(**batch, max_new_tokens=4).shape == (3, 5)


def test_tokens_that_were_added_to_the_slm_never_come_first() -> None:
    model, batch = build_cache_model("llama"), pad_prompts(PROMPTS)
    expected = model.generate(**batch, max_new_tokens=1)
    model.resize_token_embeddings(SLM_VOCAB_SIZE + 5)
    assert torch.equal(model.generate(**batch, max_new_tokens=1), expected)
    assert model(**batch, labels=make_labels()).logits.shape[-1] == SLM_VOCAB_SIZE + 5


@pytest.mark.parametrize("kept", [1, 2, 6, torch.tensor([0, 3]), torch.tensor([4, 0])])
def test_logits_to_keep_of_fusion_cache(kept: Any) -> None:
    model, batch = (
        build_cache_model(),
        {**pad_prompts(PROMPTS), "decoder_input_ids": torch.tensor([[END, 5, 6, 7, 8, 9]] * 3)},
    )
    with torch.no_grad():
        whole = model(**batch).logits
        wanted = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
        torch.testing.assert_close(model(**batch, logits_to_keep=kept).logits, wanted)


@pytest.mark.parametrize("fusion", ["cache", "add"])
def test_the_frozen_head_is_read_once_for_a_batch(fusion: str) -> None:
    # With a slice of states, torch copies a frozen head for each row.
    llm = families.build_whole("gemma3") if fusion == "cache" else families.build_llm("t5")
    model = compose(llm, families.build_slm("gemma3"), fusion).model.eval().requires_grad_(False)
    head = (model.encoder.llm if fusion == "cache" else model.decoder).get_output_embeddings()
    seen = []
    head.register_forward_pre_hook(lambda _, states: seen.append(states[0]))
    model(**pad_prompts(PROMPTS), labels=make_labels())
    assert len(seen) == 1
    assert len(seen[0]) > 1
    assert seen[0].is_contiguous()


def test_what_fusion_cache_cannot_do_is_an_error() -> None:
    model, batch = build_cache_model(), pad_prompts(PROMPTS)
    labels = make_labels()
    mask = torch.ones_like(labels)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="hides a start token, which stands for the last prompt token"):
        model(**batch, labels=labels, decoder_attention_mask=mask)
    with pytest.raises(ValueError, match="`llm_hidden_states` have width 32, but keys and values of the layers"):
        model(**batch, labels=labels, llm_hidden_states=torch.zeros(3, 12, 32))
    for module in model.decoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    with pytest.raises(ValueError, match='Gradient checkpointing drops the cache that `fusion="cache"` fills'):
        model.train()(**batch, labels=labels)
