"""Tiny LLM-to-SLM models and their exports: each is exported once for all tests and workers."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import GPT2LMHeadModel, T5EncoderModel, T5ForConditionalGeneration

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.conversion import export
from modeling_llm2slm.inference.engine import engine as engine_named
from tests.support import families
from tests.support.common import (
    LLM_VOCAB_SIZE,
    SLM_VOCAB_SIZE,
    compose,
    gpt2_config,
    learn_by_heart,
    llm_tokenizer,
    slm_tokenizer,
    t5_config,
)


def needs(name: str) -> None:
    """Skip the test if the packages of an engine, or transformers' exported models, are missing."""
    for package in (*engine_named(name).packages, "nncf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'modeling-llm2slm[{name}]'")
    if importlib.util.find_spec("transformers.exporters.metadata") is None:
        pytest.skip("needs transformers 5.23, the first with exported models")


@functools.cache
def learned(slm: str, fusion: str) -> LLM2SLMForConditionalGeneration:
    """A model of one layer on each side whose outputs for `PROMPTS` all differ and vary."""
    torch.manual_seed(0)
    vocab_size = SLM_VOCAB_SIZE if fusion == "add_shared" else LLM_VOCAB_SIZE
    llm = T5EncoderModel(t5_config(num_layers=1, vocab_size=vocab_size)).eval()
    small: dict[str, Any] = {
        "gpt2": lambda: GPT2LMHeadModel(gpt2_config(n_layer=1)),
        "t5": lambda: T5ForConditionalGeneration(families.SLMS["t5"].config(num_decoder_layers=1)),
    }
    model = compose(llm, small.get(slm, lambda: families.build_slm(slm))().eval(), fusion).model
    learn_by_heart(model)
    return model.eval()


def checkpoint(slm: str, fusion: str, folder: Path) -> Path:
    """Write `learned` to disk, with a processor."""
    learned(slm, fusion).save_pretrained(folder)
    tokenizers = (slm_tokenizer(), slm_tokenizer()) if fusion == "add_shared" else (llm_tokenizer(), slm_tokenizer())
    LLM2SLMProcessor(*tokenizers).save_pretrained(folder)
    return folder


def exported_folder(
    tmp_path_factory: Any, slm: str, fusion: str, weights: str = "fp32", engine: str = "openvino"
) -> Path:
    """The folder of an exported model, not to be changed."""
    shared = tmp_path_factory.getbasetemp().parent if _in_worker() else tmp_path_factory.getbasetemp()
    folder = shared / f"{engine}-{slm}-{fusion}-{weights}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            source = checkpoint(slm, fusion, tmp_path_factory.mktemp("source"))
            export(source, folder, engine=engine, weights=weights)
    return folder


def _in_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ
