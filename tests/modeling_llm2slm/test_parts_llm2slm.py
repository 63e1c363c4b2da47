"""Which models can be the LLM or the SLM, what of the LLM is loaded and run, and what is refused with the reason."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MPNetConfig,
    MPNetModel,
)

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.fusion_llm2slm import embedding_rms
from modeling_llm2slm.parts_llm2slm import keep_layers
from tests.support import families
from tests.support.common import (
    PROMPTS,
    build_parts,
    compose,
    count_calls,
    pad_prompts,
    reference_states,
    same_tensors,
)
from tests.support.families import LLM_VOCAB_SIZE, LLMS, SLMS, build_llm, build_slm


Model = LLM2SLMForConditionalGeneration


def whole_checkpoint(family: str, folder: Path) -> str:
    """An LLM as its users save it: with the head that it generates or was trained with."""
    torch.manual_seed(1)
    config = LLMS[family].config(vocab_size=LLM_VOCAB_SIZE)
    if family in ("bert", "roberta"):
        model = build_llm(family)
    else:
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("fusion", ["add", "replace"])
@pytest.mark.parametrize("family", LLMS)
def test_hidden_states_equal_those_of_the_whole_llm(family: str, fusion: str) -> None:
    """One prompt at a time, without padding, is the truth for every padding; through save and load as well."""
    parts = compose(build_llm(family), build_slm("gpt2"), fusion, encoder_layer=LLMS[family].layer)
    for side in ("left", "right"):
        batch = pad_prompts(PROMPTS, side, extra=3)
        states = parts.model.encode_llm(**batch)
        for row, prompt in enumerate(PROMPTS):
            kept = batch["attention_mask"][row].bool()
            torch.testing.assert_close(states[row][kept], reference_states(parts, prompt)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", LLMS)
def test_hidden_states_and_attentions_are_in_the_layout_of_the_input(family: str) -> None:
    parts = compose(build_llm(family), build_slm("gpt2"), "add", encoder_layer=LLMS[family].layer)
    parts.model.set_attn_implementation("eager")
    sequences = {"decoder_input_ids": torch.tensor([[families.END]] * len(PROMPTS))}
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        outputs = {
            side: parts.model(**pad_prompts(PROMPTS, side), **sequences, **wanted) for side in ("left", "right")
        }
    masks = {side: pad_prompts(PROMPTS, side)["attention_mask"].bool() for side in outputs}
    for row in range(len(PROMPTS)):
        left, right = masks["left"][row], masks["right"][row]
        for first, second in zip(*(outputs[side].encoder_hidden_states for side in ("left", "right")), strict=True):
            torch.testing.assert_close(first[row][left], second[row][right])
        for first, second in zip(*(outputs[side].encoder_attentions for side in ("left", "right")), strict=True):
            torch.testing.assert_close(first[row][:, left][..., left], second[row][:, right][..., right])


@pytest.mark.parametrize("family", LLMS)
def test_an_llm_and_an_slm_from_folders_save_and_load(family: str, tmp_path: Path) -> None:
    """The factory takes the whole LLM's folder; its model is saved and loaded with the same weights and outputs."""
    build_slm("gpt2").save_pretrained(tmp_path / "slm")
    layer = LLMS[family].layer
    model = Model.from_encoder_decoder_pretrained(
        whole_checkpoint(family, tmp_path / "llm"), str(tmp_path / "slm"), encoder_layer=layer
    )
    model.save_pretrained(tmp_path / "both")
    loaded, info = Model.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert not any(info.values()), info
    same_tensors(loaded.state_dict(), model.state_dict())
    batch = pad_prompts(PROMPTS, "left")
    assert torch.equal(loaded.encode_llm(**batch), model.encode_llm(**batch))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "t5", "bart", "bert"])
def test_layers_above_are_neither_loaded_nor_computed(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = whole_checkpoint(family, tmp_path / "llm")
    build_slm("gpt2").save_pretrained(tmp_path / "slm")
    models = {
        layer: Model.from_encoder_decoder_pretrained(path, str(tmp_path / "slm"), encoder_layer=layer)
        for layer in (None, 0, 1, 2, 3)
    }
    sizes = [models[layer].encoder.llm.num_parameters() for layer in (0, 1, 2, 3)]
    steps = [after - before for before, after in zip(sizes, sizes[1:], strict=False)]
    assert steps[0] == pytest.approx(steps[1], rel=0.1)
    assert sizes[2] < sizes[3]
    assert sizes[3] == models[None].encoder.llm.num_parameters()
    assert not [record for record in caplog.records if "not used" in record.message or "newly init" in record.message]
    batch = pad_prompts(PROMPTS[:1])
    whole = models[None].encoder.run_llm(**batch, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2, 3):
        llm = models[layer].encoder.llm
        stacks = [module for module in llm.modules() if isinstance(module, nn.ModuleList) and len(module) == layer]
        with count_calls(stacks[0][-1]) if layer else count_calls(llm) as calls:
            states = models[layer].encode_llm(**batch)
        assert len(calls) == 1
        torch.testing.assert_close(states, whole[layer], rtol=1e-4, atol=1e-5)


def test_the_callers_llm_keeps_its_layers() -> None:
    llm = build_llm("llama")
    before = llm.num_parameters()
    model = Model.from_encoder_decoder_pretrained(encoder_model=llm, decoder_model=build_slm("gpt2"), encoder_layer=1)
    assert llm.num_parameters() == before
    assert model.encoder.llm.layers[0].mlp.up_proj.weight is llm.layers[0].mlp.up_proj.weight
    assert llm(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states[3] is not None


def test_an_llm_without_one_list_of_layers_is_refused() -> None:
    llm = build_llm("t5")
    llm.config.num_layers = 7
    with pytest.raises(ValueError, match="7 layers are not in one list. Leave it out"):
        keep_layers(llm, 2)


@pytest.mark.parametrize("fusion", ["add", "replace"])
@pytest.mark.parametrize(
    ("slm", "llm", "layers"),
    [*itertools.product(SLMS, ["t5", "llama", "bert"], [2]), ("gpt2", "t5", 1), ("gpt2", "t5", 3)],
)
def test_a_new_projector_keeps_the_scale_of_the_slms_embeddings(slm: str, llm: str, layers: int, fusion: str) -> None:
    """It is the scale of what the SLM reads: Gemma scales embeddings, and those of a small OPT are narrower."""
    config = {"encoder_layer": LLMS[llm].layer, "projector_layers": layers}
    parts = compose(build_llm(llm), build_slm(slm), fusion, **config)
    for linear in parts.model.encoder.projector.linears:
        nn.init.zeros_(linear.bias)
    parts.model.encoder.fusion.initialize(parts.model.encoder)  # its first bias shifts hidden states by their mean
    prompts = [[(17 * row + 7 * place) % 110 + 5 for place in range(20)] for row in range(8)]
    batch = pad_prompts(prompts)
    encoder = parts.model.encoder
    embeds = encoder.fusion.combine(encoder, parts.model.encode_llm(**batch), encoder.embed_tokens(batch["input_ids"]))
    assert float(embeds.detach().square().mean().sqrt()) / embedding_rms(parts.slm) == pytest.approx(1, rel=0.5)


def test_a_composite_is_no_part_of_another_one(tmp_path: Path) -> None:
    """`AutoModel` loads a composite too."""
    slm = build_slm("gpt2")
    Model(LLM2SLMConfig(encoder=LLMS["t5"].config(vocab_size=120), decoder=slm.config)).save_pretrained(tmp_path)
    for llm in (
        {"encoder_model": Model.from_pretrained(tmp_path)},
        {"encoder_pretrained_model_name_or_path": tmp_path},
    ):
        with pytest.raises(ValueError, match="A llm2slm model cannot be the LLM: .* Take its LLM"):
            Model.from_encoder_decoder_pretrained(**llm, decoder_model=slm)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_a_prompt_beyond_the_llms_positions_is_an_error(family: str) -> None:
    """RoBERTa's positions begin after its pad id: it has as many fewer."""
    model = compose(build_llm(family), build_slm("t5"), "add", encoder_layer=LLMS[family].layer).model
    limit = 79 if family == "roberta" else 80
    assert model.encode_llm(torch.full((1, limit), 5)).shape[1] == limit
    for call in (model.encode_llm, model.encode_prompt, model.generate):
        with pytest.raises(
            ValueError, match=rf"{limit + 1} tokens wide.*LLM has {limit} positions.*prompt_max_length"
        ):
            call(torch.full((1, limit + 1), 5))


def test_positions_of_mpnet_begin_after_its_pad_id() -> None:
    llm = MPNetModel(MPNetConfig(**{**families.BERT, "vocab_size": LLM_VOCAB_SIZE, "pad_token_id": 1}))
    model = compose(llm.eval(), build_slm("t5"), "add").model
    assert model.encode_llm(torch.full((1, 78), 5)).shape[1] == 78
    with pytest.raises(ValueError, match="79 tokens wide.*LLM has 78 positions"):
        model.encode_llm(torch.full((1, 79), 5))


def test_an_llm_cannot_have_fewer_layers_than_encoder_layer() -> None:
    with pytest.raises(ValueError, match="`encoder_layer` is 4"):
        build_parts(encoder_layer=4)
