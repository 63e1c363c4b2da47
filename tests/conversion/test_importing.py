"""Importing: weights of other composite models are kept, and the report names those without a counterpart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EncoderDecoderModel, GPT2LMHeadModel, T5Model

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion.importing import import_encoder_decoder, import_projector
from tests.support.common import PROMPTS, gpt2_config, pad_prompts, t5_config
from tests.support.conversions import edit, weights_of, write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_an_encoder_decoder_model_gives_llm_and_slm(sources, tmp_path):
    report = dict(import_encoder_decoder(sources / "two", tmp_path / "new", fusion="replace").rows)
    model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new")
    theirs, ours = weights_of(sources / "two"), weights_of(tmp_path / "new")
    for name, tensor in ours.items():
        if not name.startswith("encoder.projector."):
            assert torch.equal(theirs[name.replace("encoder.llm.", "encoder.")], tensor), name
    batch = pad_prompts(PROMPTS)
    assert report["not imported"] == "12 x crossattention, 2 x enc_to_dec_proj, 4 x ln_cross_attn"
    assert report["projector"] == "new: train the result"
    assert report["processor"] == "none in the source"
    assert not model.decoder.config.add_cross_attention
    model.generate(**batch, max_new_tokens=3)


def test_weights_keep_their_dtype_whatever_the_config_says(sources, tmp_path):
    shutil.copytree(sources / "two", tmp_path / "two")
    edit(tmp_path / "two", encoder={"dtype": "bfloat16"}, decoder={"dtype": "bfloat16"})
    import_encoder_decoder(tmp_path / "two", tmp_path / "new", fusion="replace")
    theirs = weights_of(sources / "two")
    for name, tensor in weights_of(tmp_path / "new").items():
        if not name.startswith("encoder.projector."):
            assert torch.equal(theirs[name.replace("encoder.llm.", "encoder.")], tensor), name


def test_the_decoder_of_a_whole_t5_is_dropped(tmp_path):
    # What `EncoderDecoderModel.from_encoder_decoder_pretrained` makes of a T5, though it uses the encoder only.
    decoder = GPT2LMHeadModel(gpt2_config(is_decoder=True, add_cross_attention=True))
    two = EncoderDecoderModel(encoder=T5Model(t5_config()), decoder=decoder)
    two.save_pretrained(tmp_path / "two")
    report = dict(import_encoder_decoder(tmp_path / "two", tmp_path / "new").rows)
    assert "encoder.decoder" in report["not imported"]
    model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new")
    batch = pad_prompts(PROMPTS)
    with torch.no_grad():
        expected = two.eval().encoder.encoder(**batch).last_hidden_state
    assert torch.equal(model.encode_llm(**batch), expected)


def test_another_kind_of_model_is_an_error(sources, tmp_path):
    with pytest.raises(ValueError, match="is a gpt2 model, not an encoder-decoder"):
        import_encoder_decoder(sources / "slm", tmp_path / "new")


def test_a_projector_with_the_names_of_llava_is_imported(sources, tmp_path):
    file = sources / "llava" / "model.safetensors"
    report = dict(import_projector(file, sources / "full", tmp_path / "new").rows)
    theirs, ours, before = load_file(file), weights_of(tmp_path / "new"), weights_of(sources / "full")
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            assert torch.equal(ours[f"encoder.projector.{name}.{kind}"], theirs[f"mm_projector.{number}.{kind}"])
    assert before["encoder.projector.mean"].any()
    assert not ours["encoder.projector.mean"].any()  # LLaVA's reads hidden states as they are
    assert ours["encoder.projector.scale"].eq(1).all()
    rest = [name for name in before if not name.startswith("encoder.projector.")]
    assert all(torch.equal(ours[name], before[name]) for name in rest)
    assert "ReLU" in report["not imported"]


def test_a_projector_with_other_names_needs_a_mapping(sources, tmp_path):
    theirs = {f"adapter/{name}": torch.randn(32, 24 if name == "up" else 32) for name in ("up", "down")}
    save_file({**theirs, "up_b": torch.randn(32), "down_b": torch.randn(32)}, tmp_path / "projector.safetensors")
    names = {"adapter/up": "projector.linear_1.weight", "adapter/down": "projector.linear_2.weight"}
    names |= {"up_b": "projector.linear_1.bias", "down_b": "projector.linear_2.bias"}
    mapping = tmp_path / "names.json"
    mapping.write_text(json.dumps(names))
    file = tmp_path / "projector.safetensors"
    import_projector(file, sources / "lean", tmp_path / "new", mapping=mapping, include_llm=False)
    shutil.copytree(sources / "llm", tmp_path / "llm")
    copy = shutil.copytree(sources / "lean", tmp_path / "lean")
    with pytest.raises(ValueError, match="which a lean checkpoint in .*llm would replace"):
        import_projector(file, copy, tmp_path / "llm", mapping=mapping, include_llm=False, overwrite=True)
    assert (tmp_path / "llm" / "model.safetensors").is_file()
    assert torch.equal(weights_of(tmp_path / "new")["encoder.projector.linear_1.weight"], theirs["adapter/up"])
    for text, message in {
        json.dumps({**names, "up_c": "projector.linear_1.bias"}): "The file has no up_c",
        json.dumps({**names, "up_b": "projector.linear_3.bias"}): "has no projector.linear_3.bias",
        json.dumps({"adapter/up": "projector.linear_1.weight"}): "has no tensor for projector.linear",
        json.dumps({**names, "adapter/up": "projector.linear_2.weight"}): "no tensor for projector.linear_1.weight",
        json.dumps({**names, "adapter/down": "projector.linear_1.weight"}): "no tensor for projector.linear_2.weight",
        "[]": "is not a mapping of names",
        "{": "is not JSON",
    }.items():
        mapping.write_text(text)
        with pytest.raises(ValueError, match=message):
            import_projector(file, sources / "full", tmp_path / "other", mapping=mapping)
    with pytest.raises(FileNotFoundError, match="There is no mapping"):
        import_projector(file, sources / "full", tmp_path / "other", mapping=tmp_path / "none.json")


def test_a_projector_of_this_package_keeps_its_mean_and_scale(sources, tmp_path):
    projector = {
        name.removeprefix("encoder."): tensor.clone() + 1
        for name, tensor in weights_of(sources / "full").items()
        if name.startswith("encoder.projector.")
    }
    save_file(projector, tmp_path / "projector.safetensors")
    names = {f"projector.linear_{number}": f"projector.linear_{number}" for number in (1, 2)}
    (tmp_path / "names.json").write_text(json.dumps(names))
    file, mapping = tmp_path / "projector.safetensors", tmp_path / "names.json"
    import_projector(file, sources / "full", tmp_path / "new", mapping=mapping)
    written = weights_of(tmp_path / "new")
    assert all(torch.equal(written[f"encoder.{name}"], tensor) for name, tensor in projector.items())


def test_a_projector_of_other_widths_is_an_error(sources, tmp_path):
    file = tmp_path / "projector.safetensors"
    wide = {f"mm_projector.{number}.{kind}": torch.ones(9, 9) for number in (0, 2) for kind in ("weight", "bias")}
    save_file(wide, file)
    with pytest.raises(ValueError, match="the projector belongs to models of other widths"):
        import_projector(file, sources / "full", tmp_path / "new")
