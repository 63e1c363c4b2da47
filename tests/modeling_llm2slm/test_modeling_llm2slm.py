"""The model from construction to checkpoint: what it computes, what trains, what is frozen, what is saved."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, PromptStates
from tests.support import families
from tests.support.common import (
    END,
    FUSIONS,
    LLM_VOCAB_SIZE,
    PROMPTS,
    SLM_VOCAB_SIZE,
    T5_VARIANTS,
    Parts,
    build_model,
    build_parts,
    compose,
    count_calls,
    gpt2_config,
    make_labels,
    pad_prompts,
    reference_greedy,
    reference_logits,
    same_tensors,
    shared_parts,
    strip_padding,
    t5_config,
)
from tests.support.families import build_llm


Model = LLM2SLMForConditionalGeneration


def training_batch() -> dict[str, torch.Tensor]:
    return {**pad_prompts(PROMPTS), "labels": make_labels()}


def logits_of(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(**training_batch()).logits


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """An LLM and an SLM as their users save them: a whole T5 and a GPT-2."""
    torch.manual_seed(3)
    llm = T5ForConditionalGeneration(t5_config()).eval()
    slm = GPT2LMHeadModel(gpt2_config()).eval()
    paths = {"llm_path": str(tmp_path / "llm"), "slm_path": str(tmp_path / "slm")}
    llm.save_pretrained(paths["llm_path"])
    slm.save_pretrained(paths["slm_path"])
    return {"llm": llm, "slm": slm, **paths}


def from_sources(sources: dict[str, Any], **kwargs: Any) -> Model:
    return Model.from_encoder_decoder_pretrained(sources["llm_path"], sources["slm_path"], **kwargs)


# Forward and loss.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_are_those_of_the_plain_parts(fusion: str, side: str) -> None:
    parts, labels = shared_parts(fusion), make_labels()
    with torch.no_grad():
        logits = parts.model(**pad_prompts(PROMPTS, side), labels=labels).logits
    assert logits.shape == (*labels.shape, SLM_VOCAB_SIZE)
    for row, prompt in enumerate(PROMPTS):
        sequence = labels[row][labels[row] != -100].tolist()
        expected = reference_logits(parts, prompt, sequence[:-1])
        torch.testing.assert_close(logits[row, : len(sequence)], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_loss_is_the_cross_entropy_of_the_targets(fusion: str) -> None:
    parts, labels = shared_parts(fusion), make_labels()
    loss = parts.model(**pad_prompts(PROMPTS), labels=labels).loss
    terms = []
    for prompt, row in zip(PROMPTS, labels, strict=True):
        sequence = row[row != -100]
        scores = reference_logits(parts, prompt, sequence[:-1].tolist()).log_softmax(-1)
        terms += (-scores.gather(1, sequence[:, None])[:, 0]).tolist()
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_a_mask_over_the_padding_of_targets_changes_nothing() -> None:
    """Causality hides padding at the end of a target, masked or not."""
    model, batch = shared_parts("add").model, training_batch()
    mask = (batch["labels"] != -100).long()
    torch.testing.assert_close(model(**batch, decoder_attention_mask=mask).loss, model(**batch).loss)


def test_num_items_in_batch_divides_the_loss() -> None:
    """What `Trainer` passes under gradient accumulation; dropped, the loss would be too large."""
    model, batch = shared_parts("add").model, training_batch()
    items = int((batch["labels"] != -100).sum())
    mean = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(4 * items)).loss, mean / 4)


def test_labels_make_decoder_input_ids() -> None:
    model = shared_parts("add").model
    labels = torch.tensor([[5, 6, END, -100], [7, END, -100, -100]])
    expected = [[END, 5, 6, END], [END, 7, END, END]]
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == expected
    batch = pad_prompts(PROMPTS[:2])
    given = model(**batch, decoder_input_ids=torch.tensor(expected), labels=labels)
    torch.testing.assert_close(model(**batch, labels=labels).loss, given.loss)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])], ids=["one", "three", "tensor"])
def test_logits_to_keep(keep: Any) -> None:
    model, batch = shared_parts("add").model, training_batch()
    del batch["labels"]
    batch["decoder_input_ids"] = torch.tensor([[END, 4, 5, 6]] * 3)
    whole = model(**batch).logits
    kept = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, kept)


def test_tuple_output() -> None:
    model, batch = shared_parts("add").model, training_batch()
    output = model(**batch, return_dict=False)
    expected = model(**batch)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected.loss)
    torch.testing.assert_close(output[1], expected.logits)


def test_hidden_states_and_attentions_cover_output_positions() -> None:
    model = build_model("add")
    model.set_attn_implementation("eager")
    batch = training_batch()
    length, prompt_length = batch["labels"].shape[1], batch["input_ids"].shape[1]
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    heads, width = model.config.decoder.n_head, model.config.decoder.n_embd
    assert {tuple(states.shape) for states in output.decoder_hidden_states} == {(3, length, width)}
    assert {tuple(weights.shape) for weights in output.decoder_attentions} == {
        (3, heads, length, prompt_length + length)
    }
    assert output.cross_attentions is None
    assert output.encoder_last_hidden_state.shape == (3, prompt_length, width)
    assert len(output.encoder_hidden_states) == model.config.encoder.num_layers + 1
    assert output.encoder_attentions[0].shape == (3, model.config.encoder.num_heads, prompt_length, prompt_length)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_of_the_whole(implementation: str) -> None:
    expected = logits_of(shared_parts("add").model)
    model = build_model("add")
    model.set_attn_implementation(implementation)
    assert model.encoder.llm.config._attn_implementation == implementation
    assert model.decoder.config._attn_implementation == implementation
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("of_slm", ["eager", "sdpa"])
@pytest.mark.parametrize("of_llm", ["eager", "sdpa"])
def test_attention_implementation_of_each_part(
    of_llm: str, of_slm: str, sources: dict[str, Any], tmp_path: Path
) -> None:
    model = from_sources(sources, encoder_attn_implementation=of_llm, decoder_attn_implementation=of_slm)
    assert model.encoder.llm.config._attn_implementation == of_llm
    assert model.decoder.config._attn_implementation == of_slm
    assert torch.isfinite(model(**training_batch()).loss)
    model.save_pretrained(tmp_path / "saved")
    each = {"encoder": of_llm, "decoder": of_slm}
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved", attn_implementation=each)
    assert reloaded.encoder.llm.config._attn_implementation == of_llm
    assert reloaded.decoder.config._attn_implementation == of_slm
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_on_load(implementation: str, tmp_path: Path) -> None:
    """Refused by transformers where the composite does not say what it supports."""
    model = shared_parts("add").model
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert reloaded.encoder.llm.config._attn_implementation == implementation
    assert reloaded.decoder.config._attn_implementation == implementation
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slm", ["gpt2", "t5", "mt5", "bart"])
def test_attention_implementations_by_part(slm: str, tmp_path: Path) -> None:
    """On load and later, a part left out keeps its own; all stacks of a part follow it."""
    compose(families.build_llm("t5"), families.build_slm(slm), "add").model.save_pretrained(tmp_path)
    for each, of_llm, of_slm in (
        ({"encoder": "eager", "decoder": "sdpa"}, "eager", "sdpa"),
        ({"encoder": "sdpa", "decoder": "eager"}, "sdpa", "eager"),
        ({"decoder": "eager"}, "sdpa", "eager"),
        ({"": "eager"}, "sdpa", "sdpa"),
        ({"": "sdpa", "encoder": "eager", "decoder": "eager"}, "eager", "eager"),
    ):
        later = Model.from_pretrained(tmp_path)
        later.set_attn_implementation(each)
        for model in (Model.from_pretrained(tmp_path, attn_implementation=each), later):
            for part, implementation in ((model.encoder.llm, of_llm), (model.decoder, of_slm)):
                stacks = [module for module in part.modules() if isinstance(module, PreTrainedModel)]
                assert {stack.config._attn_implementation for stack in stacks} == {implementation}
            assert torch.isfinite(model(**training_batch()).loss)


# The two kinds of prompt state.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_encode_llm_replaces_running_the_llm(fusion: str, side: str) -> None:
    parts, batch, labels = shared_parts(fusion), pad_prompts(PROMPTS, side), make_labels()
    states = parts.model.encode_llm(**batch)
    assert states.shape == (*batch["input_ids"].shape, parts.llm.config.d_model)
    assert not states.requires_grad
    expected = parts.llm(**batch).last_hidden_state
    torch.testing.assert_close(states[batch["attention_mask"] == 1], expected[batch["attention_mask"] == 1])
    inputs = {"attention_mask": batch["attention_mask"], "llm_hidden_states": states}
    if fusion != "replace":
        inputs["input_ids"] = batch["input_ids"]
    with count_calls(parts.model.encoder.llm) as calls:
        given = parts.model(**inputs, labels=labels)
        prompt = parts.model.encode_prompt(**inputs)
    assert not calls
    assert torch.equal(given.logits, parts.model(**batch, labels=labels).logits)
    assert torch.equal(prompt.last_hidden_state, parts.model.encode_prompt(**batch).last_hidden_state)


def test_encode_llm_infers_the_mask() -> None:
    model, batch = shared_parts("add").model, pad_prompts(PROMPTS)
    assert torch.equal(model.encode_llm(batch["input_ids"]), model.encode_llm(**batch))


def test_encode_prompt_gives_prompt_states() -> None:
    model, batch = shared_parts("add").model, pad_prompts(PROMPTS)
    states = model.encode_prompt(**batch)
    assert isinstance(states, PromptStates)
    assert states.last_hidden_state.shape == (*batch["input_ids"].shape, model.config.hidden_size)
    assert states.attention_mask.sum(-1).tolist() == [len(prompt) for prompt in PROMPTS]
    labels = make_labels()
    expected = model(**batch, labels=labels).loss
    for mask in ({}, {"attention_mask": batch["attention_mask"]}):
        torch.testing.assert_close(model(encoder_outputs=states, labels=labels, **mask).loss, expected)


def test_projector_and_slm_train_on_hidden_states_of_the_llm() -> None:
    """Training from stored states gives the gradients of training from tokens."""
    gradients = []
    for stored in (False, True):
        model, batch = build_model("add"), training_batch()
        if stored:
            batch["llm_hidden_states"] = model.encode_llm(batch["input_ids"], batch["attention_mask"])
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# Frozen and trained.


def is_llm(name: str) -> bool:
    return name.startswith("encoder.llm.")


def check_frozen(model: Model) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_llm(name), name
    assert not any(module.training for module in model.encoder.llm.modules())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_llm_is_frozen_by_the_config(fusion: str, tmp_path: Path) -> None:
    model = build_model(fusion)
    check_frozen(model)
    check_frozen(Model(model.config))
    model.train()
    check_frozen(model)
    assert model.decoder.training
    assert model.encoder.projector.training
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    check_frozen(reloaded)
    check_frozen(reloaded.train())
    check_frozen(copy.deepcopy(reloaded))


def test_train_mode_has_dropout_in_the_slm_only() -> None:
    model = build_model("replace").train()
    batch = pad_prompts(PROMPTS)
    assert torch.equal(model.encode_llm(**batch), model.encode_llm(**batch))
    assert torch.equal(model.encode_prompt(**batch).last_hidden_state, model.encode_prompt(**batch).last_hidden_state)
    logits = [model(**batch, labels=make_labels()).logits for _ in range(2)]
    assert not torch.equal(*logits)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_all_but_the_llm(fusion: str) -> None:
    model = build_model(fusion).train()
    model(**training_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if is_llm(name):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    trained = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("encoder.")} - {"llm"}
    assert trained == ({"projector", "prompt_embedding"} if fusion == "add" else {"projector"})


def test_the_graph_ends_before_the_llm() -> None:
    """A frozen LLM keeps no activations for a backward that never comes."""
    model, kept = build_model("replace").train(), []
    handle = model.encoder.llm.register_forward_hook(
        lambda *args: kept.append(args[2].last_hidden_state.requires_grad)
    )
    model(**training_batch())
    handle.remove()
    assert kept == [False]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_freeze_llm_false_trains_the_llm(fusion: str, tmp_path: Path) -> None:
    model = build_model(fusion, freeze_llm=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert all(module.training for module in model.encoder.llm.modules())
    model(**training_batch()).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    model.save_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in AutoModelForSeq2SeqLM.from_pretrained(tmp_path).parameters())


def enable_checkpointing(model: Model, use_reentrant: bool) -> None:
    """The method has a new name from transformers 5.23 on, where the old one is deprecated."""
    name = next(
        name for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model, name)
    )
    getattr(model, name)({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("freeze_llm", [True, False])
def test_gradient_checkpointing(freeze_llm: bool, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build_model("add", freeze_llm=freeze_llm)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        model.train()
        blocks = model.decoder.transformer.h[0].attn, model.encoder.llm.encoder.block[0].layer[0]
        with count_calls(blocks[0]) as of_slm, count_calls(blocks[1]) as of_llm:
            model(**training_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(of_slm) == (2 if checkpointing else 1)  # computed again in the backward pass
        assert len(of_llm) == (2 if checkpointing and not freeze_llm else 1)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


PAIRS = [(slm, "t5") for slm in families.SLMS] + [("gpt2", llm) for llm in families.LLMS if llm != "t5"]


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_gradients_of_every_family(slm: str, llm: str) -> None:
    """Labels are not shifted twice, every weight trains, and checkpointing trains the same ones."""
    parts = (families.build_llm(llm), families.build_slm(slm))
    model = compose(*parts, "add", encoder_layer=families.LLMS[llm].layer, freeze_llm=False).model
    batch, weights = training_batch(), list(model.parameters())

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights, retain_graph=True)])

    output, labels = model(**batch), batch["labels"]
    logits, entropy = output.logits, nn.functional.cross_entropy
    twice = entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = gradients(entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(gradients(model(**batch).loss), expected)
    assert (gradients(twice) - expected).norm() > 0.1 * expected.norm()

    trained = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=False)
        model.train()(**batch).loss.backward()
        trained.append({name for name, weight in model.named_parameters() if weight.grad.abs().sum() > 0})
        model.zero_grad()
    assert trained[0] == trained[1] == {name for name, _ in model.named_parameters()}


# The factory: the parts stay what they were.


def test_parts_equal_their_sources(sources: dict[str, Any]) -> None:
    model = from_sources(sources)
    assert not model.training
    batch = pad_prompts(PROMPTS)
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(sources["llm_path"])(**batch).last_hidden_state
    assert torch.equal(model.encode_llm(**batch), expected)
    ids = torch.tensor([[4, 8, 15, 16]])
    assert torch.equal(model.decoder(ids).logits, sources["slm"](ids).logits)
    assert not [name for name, _ in model.named_parameters() if ".decoder.block" in name]


@pytest.mark.parametrize("variant", T5_VARIANTS)
def test_every_kind_of_t5(variant: str, tmp_path: Path) -> None:
    T5ForConditionalGeneration(t5_config(variant)).save_pretrained(tmp_path / "llm")
    parts = build_parts("add", llm=variant)
    model = Model.from_encoder_decoder_pretrained(
        str(tmp_path / "llm"), decoder_model=parts.slm, fusion="add", shared_tokenizer=False
    )
    model.save_pretrained(tmp_path / "saved")
    check_reload(model, tmp_path / "saved")
    sequence = parts.model.generate(**pad_prompts(PROMPTS), max_new_tokens=6, do_sample=False)
    assert strip_padding(sequence) == [reference_greedy(parts, prompt, 6)[0] for prompt in PROMPTS]


def test_factory_arguments_reach_their_part(sources: dict[str, Any]) -> None:
    model = from_sources(
        sources, fusion="replace", encoder_dtype="bfloat16", decoder_attn_pdrop=0.25, encoder_dropout_rate=0.5
    )
    assert model.config.fusion == "replace"
    assert model.encoder.llm.dtype == torch.bfloat16
    assert model.decoder.dtype == torch.float32
    assert model.decoder.config.attn_pdrop == 0.25
    assert model.encoder.llm.config.dropout_rate == 0.5


def test_factory_takes_configs(sources: dict[str, Any]) -> None:
    config = GPT2Config.from_pretrained(sources["slm_path"], resid_pdrop=0.3)
    model = from_sources(sources, decoder_config=config)
    assert model.decoder.config.resid_pdrop == 0.3


def test_factory_does_not_change_its_sources(sources: dict[str, Any]) -> None:
    """Configs and models given as objects may serve elsewhere, too."""
    llm, slm = T5EncoderModel(t5_config()), GPT2LMHeadModel(gpt2_config())
    configs = [llm.config.to_dict(), slm.config.to_dict()]
    config = LLM2SLMConfig(encoder=llm.config, decoder=slm.config)
    Model(config)
    assert [llm.config.to_dict(), slm.config.to_dict()] == configs
    assert (sources["llm"].config.is_encoder_decoder, sources["slm"].config.is_encoder_decoder) == (True, False)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((None, None), {}, "encoder_pretrained_model_name_or_path|encoder_model"),
        (("llm_path", None), {}, "decoder_pretrained_model_name_or_path|decoder_model"),
        (("llm_path", "slm_path"), {"fusionn": "add"}, "fusionn"),
        (("llm_path", "slm_path"), {"attn_implementation": "eager"}, "encoder_.*decoder_"),
        (("llm_path", "slm_path"), {"fusion": "concat"}, "fusion"),
        (("llm_path", "slm_path"), {"encoder_layer": 9}, "encoder_layer.*3 layers"),
        (("llm_path", "slm_path"), {"decoder_start_token_id": 1000}, "decoder_start_token_id"),
    ],
)
def test_factory_errors(args: tuple, kwargs: dict[str, Any], message: str, sources: dict[str, Any]) -> None:
    paths = [sources[name] if name else None for name in args]
    with pytest.raises(ValueError, match=message):
        Model.from_encoder_decoder_pretrained(*paths, **kwargs)


def test_factory_refuses_a_model_without_a_head() -> None:
    parts = build_parts("add")
    with pytest.raises(ValueError, match="decoder_model"):
        Model.from_encoder_decoder_pretrained(
            encoder_model=parts.llm, decoder_model=parts.slm.transformer, shared_tokenizer=False
        )


@pytest.mark.parametrize("layer", [0, 1, 2, 3, None, [2, 0], [1, 3]])
def test_encoder_layer(layer: Any, sources: dict[str, Any], tmp_path: Path) -> None:
    """H is `hidden_states[k]` of the full model, or of several k, and no layer above is built, saved or loaded."""
    model, batch = from_sources(sources, encoder_layer=layer), pad_prompts(PROMPTS)
    full = T5EncoderModel.from_pretrained(sources["llm_path"])
    outputs = full(**batch, output_hidden_states=True)
    if isinstance(layer, list):
        expected, layer = torch.cat([outputs.hidden_states[one] for one in layer], dim=-1), max(layer)
    else:
        expected = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    torch.testing.assert_close(model.encode_llm(**batch), expected)
    assert model.encoder.projector.linear_1.in_features == model.config.llm_hidden_size == expected.shape[-1]
    assert model.encode_prompt(**batch).hidden_states is None
    if layer not in (3, None):
        assert model.encoder.llm.num_parameters() < full.num_parameters()
    assert len(model.encoder.llm.encoder.block) == (3 if layer is None else layer)
    model.save_pretrained(tmp_path / "saved")
    reloaded = check_reload(model, tmp_path / "saved")
    torch.testing.assert_close(reloaded.encode_llm(**batch), expected)
    assert reloaded.config.encoder.num_layers == 3
    assert reloaded.generate(**batch, max_new_tokens=3).shape[0] == 3


# Saving and loading.


def check_reload(model: Model, path: Path) -> Model:
    """Reload with no key missing or unexpected; parameters, ties and buffers are those of the model."""
    reloaded, report = AutoModelForSeq2SeqLM.from_pretrained(path, output_loading_info=True)
    assert type(reloaded) is Model
    assert not any(report.values()), report
    same_tensors(reloaded.state_dict(), model.state_dict())
    assert not reloaded.training
    assert torch.equal(logits_of(reloaded), logits_of(model))
    return reloaded


@pytest.mark.parametrize("fusion", FUSIONS)
def test_save_and_load(fusion: str, tmp_path: Path) -> None:
    model = build_model(fusion)
    model.save_pretrained(tmp_path)
    reloaded = check_reload(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LLM2SLMConfig
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llm2slm"
    kwargs = {**pad_prompts(PROMPTS), "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert reloaded.generate(**kwargs).tolist() == model.generate(**kwargs).tolist()


@pytest.mark.parametrize("tied_llm", [True, False])
@pytest.mark.parametrize("tied_slm", [True, False])
def test_ties_are_pointers_after_loading(tied_llm: bool, tied_slm: bool, tmp_path: Path) -> None:
    llm = T5EncoderModel(t5_config("tied" if tied_llm else "untied"))
    slm = GPT2LMHeadModel(gpt2_config(tie_word_embeddings=tied_slm))
    model = Model.from_encoder_decoder_pretrained(encoder_model=llm, decoder_model=slm, shared_tokenizer=False)
    model.save_pretrained(tmp_path)
    reloaded = check_reload(model.eval(), tmp_path)
    for loaded in (model, reloaded):
        encoder = loaded.encoder.llm
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        assert (loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight) == tied_slm
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "encoder.llm.encoder.embed_tokens.weight" not in names
    assert ("decoder.lm_head.weight" in names) != tied_slm


def test_loading_with_a_device_map(tmp_path: Path) -> None:
    model = build_model("add")
    model.save_pretrained(tmp_path)
    reloaded = Model.from_pretrained(tmp_path, device_map="cpu")
    check_frozen(reloaded)
    assert torch.equal(logits_of(reloaded), logits_of(model))


def test_parameter_names() -> None:
    for fusion in FUSIONS:
        names = [name for name, _ in build_model(fusion).named_parameters(remove_duplicate=False)]
        expected = {"encoder.llm", "encoder.projector"} | ({"encoder.prompt_embedding"} if fusion == "add" else set())
        assert {".".join(name.split(".")[:2]) for name in names if name.startswith("encoder.")} == expected
        assert all(name.startswith(("encoder.", "decoder.")) for name in names)
        assert {"linear_1", "linear_2"} == {name.split(".")[2] for name in names if ".projector." in name}


@pytest.mark.parametrize("layers", [1, 3])
def test_projectors_of_other_depths(layers: int, tmp_path: Path) -> None:
    model = build_model("replace", projector_layers=layers)
    projector = model.encoder.projector
    names = {name.split(".")[0] for name, _ in projector.named_parameters()}
    assert names == {f"linear_{number + 1}" for number in range(layers)}
    states = torch.randn(2, 5, projector.linear_1.in_features)
    expected = (states - projector.mean) / projector.scale
    for name in sorted(names):
        linear = getattr(projector, name)
        expected = (expected.relu() if name != "linear_1" else expected) @ linear.weight.T + linear.bias
    assert torch.allclose(projector(states), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    check_reload(model, tmp_path)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = build_model("add")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    check_reload(model, tmp_path)


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    """T5 has transformers ignore unexpected keys with "decoder" in them; here these are the SLM's."""
    from safetensors.torch import load_file, save_file

    model = build_model("add")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.transformer.h.7.ln_1.weight"] = torch.ones(3)
    del tensors["encoder.projector.linear_1.weight"], tensors["decoder.transformer.wpe.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"encoder.projector.linear_1.weight", "decoder.transformer.wpe.weight"}
    assert set(report["unexpected_keys"]) == {"decoder.transformer.h.7.ln_1.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_on_load(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("add")
    model.save_pretrained(tmp_path)
    reloaded = Model.from_pretrained(tmp_path, dtype=dtype)
    assert reloaded.dtype == dtype
    kept = {name for name, parameter in reloaded.named_parameters() if parameter.dtype != dtype}
    # In float16, T5's `wo` stays float32, as it does in T5 alone.
    assert all(name.endswith("wo.weight") and dtype == torch.float16 for name in kept), kept
    assert bool(kept) == (dtype == torch.float16)
    assert torch.isfinite(reloaded(**training_batch()).loss)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_llm_in_bfloat16_slm_in_float32(fusion: str, tmp_path: Path) -> None:
    source = build_parts(fusion)
    model = Model.from_encoder_decoder_pretrained(
        encoder_model=copy.deepcopy(source.llm).bfloat16(), decoder_model=source.slm, **FUSIONS[fusion]
    )
    check_mixed(model)
    parts = Parts(model, source.llm, source.slm)
    expected = reference_logits(parts, PROMPTS[0], [4, 5])
    given = torch.tensor([[END, 4, 5]])
    actual = model(input_ids=torch.tensor(PROMPTS[:1]), decoder_input_ids=given).logits[0]
    assert (actual - expected).abs().mean() < 0.1 * expected.std()
    assert model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, num_beams=2).shape[0] == 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(**training_batch()).loss
    before.backward()
    optimizer.step()
    after = model(**training_batch()).loss
    assert after < before
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"dtype": "auto"}, {"dtype": torch.float32}):
        reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, **kwargs)
        check_mixed(reloaded)
        same_tensors(reloaded.state_dict(), model.state_dict())
        torch.testing.assert_close(logits_of(reloaded), logits_of(model.eval()))
        assert reloaded.encode_llm(**pad_prompts(PROMPTS)).dtype == torch.bfloat16


def check_mixed(model: Model) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if is_llm(name) else torch.float32), name
    assert model.dtype == torch.float32


def test_encoder_dtype_of_the_factory(sources: dict[str, Any], tmp_path: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        check_mixed(from_sources(sources, encoder_dtype=dtype))
    half = from_sources(sources, encoder_dtype="bfloat16", decoder_dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    assert {p.dtype for p in Model.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_hidden_states_that_overflow_in_float16_are_an_error() -> None:
    model = build_model("add")
    with torch.no_grad():
        model.encoder.llm.encoder.final_layer_norm.weight.fill_(6e4)
    model.encoder.llm.half()
    with pytest.raises(ValueError, match="bfloat16"):
        model.encode_llm(torch.tensor(PROMPTS[:1]))


# Scale of a new projector.


def rms(tensor: torch.Tensor) -> float:
    return tensor.float().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("norm_scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_new_projector_keeps_the_scale_of_the_slm(fusion: str, norm_scale: float) -> None:
    """Whatever the scale of the LLM's states: that of a pretrained T5 is not 1."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        vocabulary = SLM_VOCAB_SIZE if fusion == "add_shared" else LLM_VOCAB_SIZE
        llm = T5EncoderModel(t5_config(vocab_size=vocabulary, d_model=64, d_ff=128))
        with torch.no_grad():
            llm.encoder.final_layer_norm.weight.mul_(norm_scale)
        slm = GPT2LMHeadModel(gpt2_config(n_embd=64))
        model = Model.from_encoder_decoder_pretrained(encoder_model=llm, decoder_model=slm, **FUSIONS[fusion])
        ids = torch.randint(2, SLM_VOCAB_SIZE, (4, 20))
        ratios.append(rms(model.encode_prompt(ids).last_hidden_state) / rms(slm.transformer.wte.weight))
    assert 0.7 < sum(ratios) / len(ratios) < 1.5, ratios


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_model_from_a_config_has_the_scale_of_the_slm(fusion: str) -> None:
    torch.manual_seed(0)
    config = LLM2SLMConfig(
        encoder=t5_config(d_model=64, vocab_size=SLM_VOCAB_SIZE), decoder=gpt2_config(n_embd=64), **FUSIONS[fusion]
    )
    model = Model(config).eval()
    ids = torch.randint(2, SLM_VOCAB_SIZE, (4, 20))
    ratio = rms(model.encode_prompt(ids).last_hidden_state) / rms(model.decoder.transformer.wte.weight)
    assert 0.7 < ratio < 1.5


@pytest.mark.parametrize("huge", [0.0, 300.0, -20000.0])
@pytest.mark.parametrize("fusion", ["replace", "add"])
def test_a_huge_constant_dimension_of_the_llm_is_no_scale(fusion: str, huge: float) -> None:
    """As in pretrained decoder-only LLMs: what differs between tokens arrives in the scale of the SLM."""
    torch.manual_seed(0)
    llm = build_llm("llama")
    with torch.no_grad():
        llm.get_input_embeddings().weight.normal_()
        llm.get_input_embeddings().weight[:, 5].add_(huge)
    slm = GPT2LMHeadModel(gpt2_config(n_embd=64))
    model = Model.from_encoder_decoder_pretrained(
        encoder_model=llm, decoder_model=slm, fusion=fusion, shared_tokenizer=False, encoder_layer=1
    )
    ids = torch.randint(3, LLM_VOCAB_SIZE, (8, 20))
    projected = model.encoder.projector(model.encode_llm(ids)).flatten(0, 1)
    expected = rms(slm.transformer.wte.weight) / (1 if fusion == "replace" else 2**0.5)
    assert 0.4 < rms(projected - projected.mean(0)) / expected < 1.5
    assert rms(projected.mean(0)) < expected


def test_with_its_own_embedding_an_slm_starts_as_if_it_were_alone() -> None:
    parts = build_parts("add_shared")
    model = Model.from_encoder_decoder_pretrained(
        encoder_model=parts.llm, decoder_model=parts.slm, **FUSIONS["add_shared"]
    )
    prompt, labels = torch.tensor([PROMPTS[0]]), make_labels(rows=1)
    start = model.prepare_decoder_input_ids_from_labels(labels)
    alone = parts.slm(torch.cat([prompt, start], dim=1)).logits[:, prompt.shape[1] :]
    torch.testing.assert_close(model(input_ids=prompt, labels=labels).logits, alone)
    model.train()(input_ids=prompt, labels=labels).loss.backward()
    assert model.encoder.projector.linear_2.weight.grad.any()


# Embeddings, copies, wrong inputs.


def test_embeddings_are_the_slms() -> None:
    model = build_model("add")
    assert model.get_input_embeddings() is model.decoder.transformer.wte
    assert model.get_output_embeddings() is model.decoder.lm_head
    assert (model.config.vocab_size, model.config.hidden_size) == (SLM_VOCAB_SIZE, 32)
    assert model.config.get_text_config().vocab_size == SLM_VOCAB_SIZE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fusion", ["add", "add_shared"])
def test_resize_token_embeddings(fusion: str, tied: bool, tmp_path: Path) -> None:
    model = build_model(fusion)
    if tied:
        model.decoder.config.tie_word_embeddings = True
        model.decoder.tie_weights()
    llm_size = model.encoder.llm.get_input_embeddings().num_embeddings
    old = model.get_input_embeddings().weight[:SLM_VOCAB_SIZE].clone()
    embeddings = model.resize_token_embeddings(SLM_VOCAB_SIZE + 6)
    assert embeddings is model.get_input_embeddings()
    assert (
        embeddings.num_embeddings == model.config.vocab_size == model.config.decoder.vocab_size == SLM_VOCAB_SIZE + 6
    )
    assert torch.equal(embeddings.weight[:SLM_VOCAB_SIZE], old)
    assert model.encoder.llm.get_input_embeddings().num_embeddings == llm_size
    batch = pad_prompts(PROMPTS)
    assert model(**batch, labels=torch.full((3, 2), SLM_VOCAB_SIZE + 5)).logits.shape[-1] == SLM_VOCAB_SIZE + 6
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 3
    model.save_pretrained(tmp_path)
    check_reload(model, tmp_path)


SIZES = [((105,), {}, 105), ((80,), {}, 80), ((None,), {"pad_to_multiple_of": 64}, 128), ((101, 8), {}, 104)]


@pytest.mark.parametrize("slm", families.SLMS)
def test_resizing_the_embeddings_of_every_family(slm: str, tmp_path: Path) -> None:
    """Up, down and to a multiple: the new size holds in config, logits, outputs and checkpoint."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 2)
    config = families.SLMS[slm].config(**special)
    for args, kwargs, size in SIZES:
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = compose(families.build_llm("t5"), auto_class.from_config(config).eval(), "add").model
        before = model.get_input_embeddings().weight[:80].detach().clone()
        assert model.resize_token_embeddings(*args, **kwargs).num_embeddings == size
        assert model.config.vocab_size == model.config.decoder.vocab_size == size
        assert torch.equal(model.get_input_embeddings().weight[:80], before)
        assert model.encoder.llm.get_input_embeddings().num_embeddings == LLM_VOCAB_SIZE
        batch = {**pad_prompts(PROMPTS), "labels": torch.full((3, 2), size - 1)}
        output = model(**batch)
        assert output.logits.shape[-1] == size
        output.loss.backward()
        assert model.generate(**pad_prompts(PROMPTS), max_new_tokens=3, num_beams=2).max() < size
        with pytest.raises(ValueError, match=f"the SLM's vocabulary has ids from 0 to {size - 1}"):
            model(**batch | {"labels": torch.full((3, 2), size)})
        model.save_pretrained(tmp_path)
        assert torch.equal(Model.from_pretrained(tmp_path)(**batch).logits, output.logits)


def test_a_copy_shares_nothing() -> None:
    """`encoder` knows the SLM without registering it: a copy has to know its own."""
    model = build_model("add_shared")
    copied, expected = copy.deepcopy(model), logits_of(model)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in copied.parameters()}
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits_of(model), expected)
    changed = logits_of(copied)
    assert not torch.allclose(changed, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(copied), changed)
    assert len(copied.state_dict()) == len(model.state_dict())


def test_the_slm_can_be_replaced() -> None:
    model = build_model("add_shared")
    other = GPT2LMHeadModel(gpt2_config()).eval()
    model.decoder = other
    parts = Parts(model, build_parts("add_shared").llm, other)
    sequences = model.generate(**pad_prompts(PROMPTS), max_new_tokens=5, do_sample=False)
    assert strip_padding(sequences) == [reference_greedy(parts, prompt, 5)[0] for prompt in PROMPTS]


IDS = torch.tensor(PROMPTS[:1])
LABELS = torch.tensor([[4, END]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": LABELS}, "no prompt.*input_ids"),
        ({"input_ids": IDS}, "labels.*decoder_input_ids"),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": torch.zeros(1, 8)}, "empty"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": LABELS}, "empty"),
        ({"input_ids": IDS, "labels": torch.full((1, 57), 4)}, "8 tokens.* 57.* 64 positions"),
        ({"llm_hidden_states": torch.zeros(1, 8, 24), "labels": LABELS}, "input_ids"),
        ({"llm_hidden_states": torch.zeros(2, 8, 24), "labels": LABELS}, "mask"),
        ({"inputs_embeds": torch.zeros(1, 8, 24), "labels": LABELS}, "inputs_embeds"),
        (
            {"input_ids": IDS, "labels": LABELS, "logits_to_keep": 1},
            "`labels` have shape .* for .1, 1.. Cut them",
        ),
        (
            {"input_ids": IDS, "decoder_inputs_embeds": torch.zeros(1, 2, 32), "labels": LABELS},
            "decoder_inputs_embeds",
        ),
    ],
)
def test_wrong_inputs_are_errors(inputs: dict[str, torch.Tensor], message: str) -> None:
    model = shared_parts("add").model
    with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match=message):
        model(**inputs)
    assert not calls


NO_PROMPT = "There is no prompt: pass `input_ids`, `llm_hidden_states` or `encoder_outputs`."
TOKENS = torch.tensor([[END, 4]])


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"inputs": None},
        {"input_ids": None},
        {"attention_mask": torch.ones_like(IDS)},
        {"decoder_input_ids": TOKENS},
        {"input_ids": torch.empty(0, 5, dtype=torch.long), "attention_mask": torch.empty(0, 5)},
        {"inputs": torch.tensor([])},
        {"llm_hidden_states": torch.empty(0, 5, 24)},
        {"encoder_outputs": ()},
        {"encoder_outputs": (None,)},
        {"encoder_outputs": PromptStates()},
        {"encoder_outputs": PromptStates(torch.empty(0, 5, 32), torch.empty(0, 5))},
    ],
)
def test_every_way_in_says_the_same_about_a_prompt_that_is_not_there(inputs: dict[str, Any]) -> None:
    model = shared_parts("add").model
    given = {name.replace("inputs", "input_ids", name == "inputs"): value for name, value in inputs.items()}
    prompt = {name: value for name, value in given.items() if name in ("input_ids", "attention_mask")}
    ways = [
        lambda: model.generate(**inputs, max_new_tokens=3),
        lambda: model.generate(**inputs, max_new_tokens=3, num_beams=2),
        lambda: model.generate(**inputs, max_new_tokens=3, prompt_lookup_num_tokens=2),
        lambda: model(**{"decoder_input_ids": TOKENS} | given),
    ]
    if "decoder_input_ids" not in given:
        ways.append(lambda: model(**given, labels=TOKENS))
    if not given.keys() & {"encoder_outputs", "llm_hidden_states", "decoder_input_ids"}:
        ways += [lambda: model.encode_prompt(**prompt), lambda: model.encode_llm(**{"input_ids": None} | prompt)]
    for way in ways:
        with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match=f"^{re.escape(NO_PROMPT)}$"):
            way()
        assert not calls


def test_every_way_in_says_the_same_about_a_prompt_without_tokens() -> None:
    model, ids = shared_parts("add").model, torch.empty(1, 0, dtype=torch.long)
    for way in (
        lambda: model(input_ids=ids, labels=LABELS),
        lambda: model.generate(ids, max_new_tokens=3),
        lambda: model.generate(input_ids=ids, max_new_tokens=3, num_beams=2),
        lambda: model.encode_prompt(ids),
    ):
        with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match="^A prompt is empty: every row"):
            way()
        assert not calls


@pytest.mark.parametrize("token_id", [LLM_VOCAB_SIZE, LLM_VOCAB_SIZE + 1000, -1, -100])
def test_an_id_beyond_the_vocabulary_of_the_llm_is_named(token_id: int) -> None:
    model, ids = shared_parts("add").model, torch.tensor([[5, token_id, 7]])
    message = (
        rf"`input_ids` holds the id {token_id}, but the LLM's vocabulary has ids from 0 to {LLM_VOCAB_SIZE - 1}\."
    )
    for way in (
        lambda: model(input_ids=ids, labels=LABELS),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=2),
        lambda: model.encode_prompt(ids),
        lambda: model.encode_llm(ids),
        lambda: model.get_encoder()(ids),
    ):
        with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match=message):
            way()
        assert not calls


@pytest.mark.parametrize("token_id", [SLM_VOCAB_SIZE, SLM_VOCAB_SIZE + 1000, -1, -101])
def test_an_id_beyond_the_vocabulary_of_the_slm_is_named(token_id: int) -> None:
    model, tokens = shared_parts("add").model, torch.tensor([[5, token_id, 7]])
    message = rf"`(labels|decoder_input_ids)` holds the id {token_id}, but the SLM's vocabulary has ids from 0 to"
    for way in (
        lambda: model(input_ids=IDS, labels=tokens),
        lambda: model(input_ids=IDS, decoder_input_ids=tokens),
        lambda: model.generate(IDS, decoder_input_ids=tokens, max_new_tokens=2),
    ):
        with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match=message):
            way()
        assert not calls
    with pytest.raises(ValueError, match="`decoder_input_ids` holds the id -100, but the SLM's"):
        model(input_ids=IDS, decoder_input_ids=torch.tensor([[5, -100]]))


def test_a_prompt_beyond_the_vocabulary_whose_embedding_a_fusion_shares() -> None:
    parts = build_parts("add_shared")
    parts.model.encoder.llm.resize_token_embeddings(SLM_VOCAB_SIZE + 9)
    with pytest.raises(ValueError, match=f"`input_ids` holds the id {SLM_VOCAB_SIZE}, but the SLM's vocabulary"):
        parts.model.encode_prompt(torch.tensor([[5, SLM_VOCAB_SIZE]]))


def test_a_mask_covers_cached_and_new_output_tokens() -> None:
    model, tokens = shared_parts("add").model, torch.tensor([[END, 4, 7, 9]])
    first = model(input_ids=IDS, decoder_input_ids=tokens[:, :3])
    rest = {"input_ids": IDS, "decoder_input_ids": tokens[:, 3:], "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match=r"has width 1\. Pass one of width 4, over the 3 output tokens"):
        model(**rest, decoder_attention_mask=torch.ones(1, 1))
    expected = model(input_ids=IDS, decoder_input_ids=tokens).logits[:, -1:]
    torch.testing.assert_close(model(**rest, decoder_attention_mask=torch.ones(1, 4)).logits, expected)


def test_the_longest_target_that_fits_is_scored() -> None:
    output = shared_parts("add").model(input_ids=IDS, labels=torch.full((1, 64 - 8), 4))
    assert torch.isfinite(output.loss)


def test_a_batch_encoding_is_accepted() -> None:
    model, batch = shared_parts("add").model, training_batch()
    torch.testing.assert_close(model(**BatchEncoding(batch)).loss, model(**batch).loss)
