"""Composing: the weights of both checkpoints are unchanged, whatever their files, dtypes and sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, T5EncoderModel

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion.compose import compose
from modeling_llm2slm.settings import BuildSettings
from tests.support import families
from tests.support.common import PROMPTS, gpt2_config, pad_prompts, slm_tokenizer
from tests.support.conversions import weights_of, write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_hidden_states_and_weights_are_those_of_the_sources(sources, tmp_path):
    report = compose(sources / "llm", sources / "slm", tmp_path / "new")
    model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new")
    llm = T5EncoderModel.from_pretrained(sources / "llm")
    batch = pad_prompts(PROMPTS)
    with torch.no_grad():
        assert torch.equal(model.encode_llm(**batch), llm(**batch).last_hidden_state)
    slm = weights_of(sources / "slm")
    written = {name.removeprefix("decoder."): tensor for name, tensor in weights_of(tmp_path / "new").items()}
    for name, tensor in slm.items():
        assert torch.equal(written[name], tensor), name
    assert ("hidden states of the LLM, largest difference", "none") in report.rows
    assert AutoProcessor.from_pretrained(tmp_path / "new").tokenizer.eos_token == "</s>"
    assert model.config.llm_source["name_or_path"] == str(sources / "llm")
    assert "# new" in (tmp_path / "new" / "README.md").read_text()


def test_a_missing_tokenizer_is_not_invented(sources, tmp_path):
    shutil.copytree(sources / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("tokenizer*"))
    report = compose(tmp_path / "llm", sources / "slm", tmp_path / "new")
    assert dict(report.rows)["processor"] == f"none, as {tmp_path / 'llm'} has no tokenizer"
    assert not (tmp_path / "new" / "tokenizer.json").exists()


def test_parts_are_read_from_subfolders(sources, tmp_path):
    """One tokenizer for both, in folders that hold nothing else."""
    for part in ("llm", "slm"):
        shutil.copytree(sources / part, tmp_path / part / "inner")
        slm_tokenizer().save_pretrained(tmp_path / part / "inner")
    inner = {"encoder_subfolder": "inner", "decoder_subfolder": "inner"}
    report = compose(tmp_path / "llm", tmp_path / "slm", tmp_path / "new", **inner)
    assert dict(report.rows)["processor"] == "of both tokenizers"
    assert AutoProcessor.from_pretrained(tmp_path / "new").tokenizer.eos_token == "<end>"
    assert LLM2SLMConfig.from_pretrained(tmp_path / "new").shared_tokenizer


def test_the_result_equals_that_of_the_factory(sources, tmp_path):
    torch.manual_seed(0)
    compose(sources / "llm", sources / "slm", tmp_path / "new", fusion="replace", encoder_layer=2)
    torch.manual_seed(0)
    made = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        sources / "llm", sources / "slm", fusion="replace", encoder_layer=2
    )
    made.save_pretrained(tmp_path / "made")
    assert weights_of(tmp_path / "new").keys() == weights_of(tmp_path / "made").keys()
    configs = [LLM2SLMConfig.from_pretrained(tmp_path / name).to_dict() for name in ("new", "made")]
    assert configs[0] == configs[1]


def test_dtypes_change_tensor_by_tensor_and_shards_are_small(sources, tmp_path):
    compose(sources / "llm", sources / "slm", tmp_path / "new", encoder_dtype="bfloat16", max_shard_size="20KB")
    model, info = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    assert (model.encoder.llm.dtype, model.dtype) == (torch.bfloat16, torch.float32)
    files = list((tmp_path / "new").glob("model-*.safetensors"))
    assert len(files) > 5
    llm = weights_of(sources / "llm")
    for name, tensor in weights_of(tmp_path / "new").items():
        if name.startswith("encoder.llm."):
            assert torch.equal(tensor, llm[name.removeprefix("encoder.llm.")].bfloat16())
        else:
            assert tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder_dtype": "int8"}, "`encoder_dtype` is 'int8'"),
        ({"decoder_dtype": "half"}, None),
        ({"fusion": "mix"}, "`fusion` is 'mix'"),
        ({"encoder_layer": 9}, "`encoder_layer` is 9"),
    ],
)
def test_wrong_settings_are_errors(kwargs, message, sources, tmp_path):
    if message is None:
        compose(sources / "llm", sources / "slm", tmp_path / "new", **kwargs)  # torch.half is float16
        return
    with pytest.raises(ValueError, match=message):
        compose(sources / "llm", sources / "slm", tmp_path / "new", **kwargs)
    assert not list(tmp_path.iterdir())


def test_parts_of_the_wrong_kind_are_errors(sources, tmp_path):
    with pytest.raises(ValueError, match="an llm2slm model cannot be the LLM"):
        compose(sources / "full", sources / "slm", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_written_once(tmp_path, sources):
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel(gpt2_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "slm")
    compose(sources / "llm", tmp_path / "slm", tmp_path / "new")
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "decoder.lm_head.weight" not in names
    assert "encoder.llm.encoder.embed_tokens.weight" not in names


@pytest.mark.parametrize("first", [True, False])
def test_an_slm_that_was_cut_from_the_llm_shares_its_layers(first, tmp_path):
    """The config of the SLM names the layers; the LLM keeps its head only if it gives the first token."""
    slm = families.build_slm("llama")
    slm.config.cut_from_layers = [0, 1]
    for name, model in (("llm", families.build_whole("llama")), ("slm", slm)):
        model.save_pretrained(tmp_path / name)
        slm_tokenizer().save_pretrained(tmp_path / name)
    settings = BuildSettings(fusion="cache", slm_first_token=not first)
    report = dict(compose(tmp_path / "llm", tmp_path / "slm", tmp_path / "new", settings).rows)
    assert report[f"{'logits' if first else 'hidden states'} of the LLM, largest difference"] == "none"
    model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert (model.config.decoder_layers, model.config.llm_first_token) == ([0, 1], first)
    assert len(model.encoder.llm.base_model.layers) == (3 if first else 2)
    built = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        tmp_path / "llm", tmp_path / "slm", fusion="cache", llm_first_token=first
    )
    batch = pad_prompts(PROMPTS)
    assert torch.equal(model.generate(**batch, max_new_tokens=6), built.generate(**batch, max_new_tokens=6))
