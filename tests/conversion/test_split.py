"""Splitting: the SLM and the projector alone, unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from modeling_llm2slm.conversion.split import split
from tests.support.conversions import edit, same_bytes, weights_of, write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("kind", ["full", "lean"])
def test_slm_and_projector_are_unchanged(kind, sources, tmp_path):
    shutil.copytree(sources / kind, tmp_path / kind)  # alone: of a lean one, the LLM is not needed
    split(tmp_path / kind, tmp_path / "parts")
    slm = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "slm")
    assert type(slm) is GPT2LMHeadModel
    same_bytes(weights_of(tmp_path / "parts" / "slm"), weights_of(sources / "slm"))
    projector = load_file(tmp_path / "parts" / "projector.safetensors")
    whole = weights_of(sources / "full")
    assert set(projector) == {
        "projector.linear_1.weight", "projector.linear_1.bias", "projector.linear_2.weight", "projector.linear_2.bias",
        "projector.mean", "projector.scale", "prompt_embedding.weight",
    }  # fmt: skip
    assert all(torch.equal(tensor, whole[f"encoder.{name}"]) for name, tensor in projector.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "parts" / "slm").eos_token == "<end>"
    assert not list((tmp_path / "parts" / "slm").glob("*_llm2slm.py"))


def test_weights_keep_their_dtype_whatever_the_config_says(sources, tmp_path):
    shutil.copytree(sources / "full", tmp_path / "full")
    edit(tmp_path / "full", dtype="bfloat16", decoder={"dtype": "bfloat16"})
    split(tmp_path / "full", tmp_path / "parts")
    same_bytes(weights_of(tmp_path / "parts" / "slm"), weights_of(sources / "slm"))
