"""Building in memory: from config files and presets, with errors before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modeling_llm2slm.conversion.build import build, float_dtype
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
