"""Checkpoints of one model, full and lean, with the LLM and the SLM that it was built from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from tests.support.common import build_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A composite of two models on disk, saved full and lean next to them."""
    folder = tmp_path_factory.mktemp("models")
    parts = build_parts()
    parts.llm.save_pretrained(folder / "llm")
    parts.slm.save_pretrained(folder / "slm")
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(folder / "llm", folder / "slm")
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "lean", include_llm=False)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The same folder, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))
