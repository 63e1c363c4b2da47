"""Building in memory: from config files and presets, with errors before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_llm2slm.conversion.build import build, float_dtype, part_config, preset_config
from tests.support.checkpoints import write_parts
from tests.support.common import same_tensors


def test_the_seed_determines_the_random_weights(tmp_path):
    _, slm, tokenizer = write_parts(tmp_path)
    a, b, c = (build(slm=slm, slm_tokenizer=tokenizer, seed=seed).model.state_dict() for seed in (1, 1, 2))
    same_tensors(a, b)
    assert any(not torch.equal(tensor, c[name]) for name, tensor in a.items())


def test_parts_that_do_not_fit_are_an_error(tmp_path):
    llm, slm, tokenizer = write_parts(tmp_path)
    with pytest.raises(ValueError, match="`fusion` is 'mix'"):
        build(llm, slm, llm_tokenizer=tokenizer, fusion="mix")
    config = json.loads(Path(slm).read_text())
    Path(slm).write_text(json.dumps({**config, "vocab_size": 5}))
    with pytest.raises(ValueError, match="has a vocabulary of 5, but the tokenizer has"):
        build(llm, slm, llm_tokenizer=tokenizer)


@pytest.mark.parametrize("part", ["LLM", "SLM"])
@pytest.mark.parametrize(("written", "vocabulary"), [(None, 120), (120, 120), (128, 128), (5000, 5000)])
def test_a_config_without_a_vocabulary_gets_that_of_its_tokenizer(tmp_path, part, written, vocabulary):
    llm, slm, tokenizer = write_parts(tmp_path)
    path = Path(llm if part == "LLM" else slm)
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "vocab_size"}
    path.write_text(json.dumps(config if written is None else {**config, "vocab_size": written}))
    model = build(llm, slm, llm_tokenizer=tokenizer, fusion="replace").model
    reads = model.config.encoder if part == "LLM" else model.config.decoder
    embedding = model.encoder.llm if part == "LLM" else model
    assert reads.vocab_size == embedding.get_input_embeddings().num_embeddings == vocabulary


def test_a_vocabulary_that_is_padded_up_by_default_stays(tmp_path, data_folder):
    _, slm, _ = write_parts(tmp_path)
    (tmp_path / "t5.json").write_text(json.dumps({"model_type": "t5"}))
    assert part_config(str(tmp_path / "t5.json"), str(data_folder / "tokenizer_t5")).vocab_size == 32128
    (tmp_path / "gpt2.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert part_config(str(tmp_path / "gpt2.json"), str(data_folder / "tokenizer_gpt2")).vocab_size == 50257


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_preset_without_a_vocabulary_is_refused_with_both_numbers(tmp_path, part):
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    *_, tokenizer = write_parts(tmp_path)
    preset = preset_config("tiny").to_dict()
    del preset[part]["vocab_size"]
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    default = {"encoder": 32128, "decoder": 50257}[part]
    tokens = len(AutoTokenizer.from_pretrained(tokenizer))
    with pytest.raises(
        ValueError, match=f"has a vocabulary of {default}, the default of its family, .* has {tokens} "
    ):
        build(preset=str(tmp_path / "preset.json"), llm_tokenizer=tokenizer)


def test_a_preset_names_both_models(tmp_path):
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    *_, tokenizer = write_parts(tmp_path)
    with pytest.raises(ValueError, match="no preset 'huge'; there are"):
        build(preset="huge", llm_tokenizer=tokenizer)
    assert build(preset="tiny", llm_tokenizer=tokenizer).model.config.model_type == "llm2slm"


@pytest.mark.parametrize("name", ["bfloat61", "int8", "Tensor"])
def test_a_dtype_that_is_no_float_is_an_error(name):
    with pytest.raises(ValueError, match=f"`encoder_dtype` is '{name}', but it must be a float such as bfloat16"):
        float_dtype("encoder_dtype", name)
    assert (float_dtype("encoder_dtype", None), float_dtype("encoder_dtype", "half")) == (None, torch.float16)
