"""The guard against deprecations has to fire, and only where somebody here can do something about it."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.conftest import DEPRECATIONS


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def test_a_deprecated_call_of_ours_is_recorded(model: GPT2LMHeadModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, generation_config=GenerationConfig(do_sample=False, pad_token_id=0), max_new_tokens=2)
    found, DEPRECATIONS.found[:] = list(DEPRECATIONS.found), []
    assert len(found) == 1
    assert "is deprecated" in found[0]
    assert "generation/utils.py" in found[0]


def test_a_deprecated_call_of_transformers_is_not(model: GPT2LMHeadModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model.generate(ids, assistant_model=model, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert DEPRECATIONS.found == []
