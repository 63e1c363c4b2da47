"""Fingerprints depend on weights and tokenizers, not on how they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modeling_llm2slm.states.fingerprints import llm_fingerprint, tokenizer_fingerprint, weights_fingerprint
from tests.support.common import build_model, llm_tokenizer, slm_tokenizer


def test_only_the_weights_of_the_llm_count(tmp_path: Path) -> None:
    model = build_model("add")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model.decoder.lm_head.weight.data.add_(1)  # the SLM trains
    model.save_pretrained(tmp_path / "trained")
    fingerprints = {name: llm_fingerprint(tmp_path / name) for name in ("one", "sharded", "trained")}
    assert len(set(fingerprints.values())) == 1
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    name = next(name for name in tensors if name.startswith("encoder.llm."))
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "trained" / "model.safetensors", metadata={"format": "pt"})
    assert llm_fingerprint(tmp_path / "trained") != fingerprints["one"]


def test_the_prefix_of_tensor_names_does_not_count(tmp_path: Path) -> None:
    model = build_model("add")
    model.save_pretrained(tmp_path / "whole")
    model.encoder.llm.save_pretrained(tmp_path / "llm")
    assert llm_fingerprint(tmp_path / "whole") == weights_fingerprint(tmp_path / "llm")


def test_a_checkpoint_without_an_llm_is_an_error(tmp_path: Path) -> None:
    build_model("add").decoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contains no LLM"):
        llm_fingerprint(tmp_path)


def test_vocabulary_and_rules_of_tokenizers_count() -> None:
    first, second = llm_tokenizer(), llm_tokenizer()
    second.padding_side = "left"
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    second.add_tokens(["new"])
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(second)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(slm_tokenizer())
