"""The LLM that a model is compared with: named by the checkpoint or by the user, or missing for a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM, T5EncoderModel

from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.playground.llm import load_llm
from tests.support.checkpoints import write_parts
from tests.support.common import llm_tokenizer, t5_config


Load = Callable[[str], TextToText]


def encoder_only(kind: str, folder: Path) -> str:
    """Write an LLM without a decoder."""
    tokenizer = llm_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(**size, vocab_size=len(tokenizer), pad_token_id=0)
    llm = BertForMaskedLM(bert) if kind == "bert" else T5EncoderModel(t5_config(vocab_size=len(tokenizer)))
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("include_llm", [True, False], ids=["full", "lean"])
def test_the_llm_is_the_one_that_the_checkpoint_names(
    include_llm: bool, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    _, slm, tokenizer = write_parts(tmp_path)
    model = build(checkpoints["llm"], slm, slm_tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model", include_llm=include_llm)
    found = load_llm(TextToText.from_pretrained(tmp_path / "model"))
    assert found.reason == ""
    assert found.text_to_text is not None
    expected = TextToText.from_pretrained(checkpoints["llm"]).generate(["src1 src2"], max_new_tokens=5)
    assert found.text_to_text.generate(["src1 src2"], max_new_tokens=5) == expected


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_llm_without_a_decoder_is_not_shown_for_this_reason(kind: str, load: Load, tmp_path: Path) -> None:
    model = load("llm2slm")
    path = encoder_only(kind, tmp_path)
    model.model.config.llm_source = {"name_or_path": path}
    found = load_llm(model)
    assert found.text_to_text is None
    assert found.reason == (
        f"Only LLM-to-SLM is shown: the LLM {path} has no decoder, so it generates no text by itself."
    )
    with pytest.raises(ValueError, match="has no decoder"):
        load_llm(model, path)


def test_a_missing_llm_is_not_shown_but_one_that_was_asked_for_must_exist(load: Load, tmp_path: Path) -> None:
    model = load("llm2slm")
    model.model.config.llm_source = None
    assert load_llm(model).reason.endswith("the checkpoint does not say where its LLM is. Name it with --llm.")
    model.model.config.llm_source = {"name_or_path": str(tmp_path / "moved")}
    assert "there is no such folder" in load_llm(model).reason
    with pytest.raises(OSError, match="there is no such folder"):
        load_llm(model, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="needs an LLM-to-SLM model"):
        load_llm(load("llm"))


def test_a_decoder_only_llm_is_shown(load: Load, checkpoints: dict[str, str]) -> None:
    found = load_llm(load("llm2slm"), checkpoints["slm"])
    assert found.text_to_text is not None
    assert not found.text_to_text.is_llm2slm
