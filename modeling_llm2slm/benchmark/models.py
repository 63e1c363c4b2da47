"""Checkpoints with a preset's sizes and random weights, which take as long as trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedTokenizerFast, set_seed

from ..conversion.build import preset_config
from ..inference.engine import BenchmarkModels
from ..inference.model import LLM2SLMForConditionalGeneration
from ..parts_llm2slm import slm_class


def make_models(preset: str, folder: Path) -> BenchmarkModels:
    """Write the LLM and the LLM-to-SLM model of a preset, in float32; the LLM's encoder is the same in both."""
    models = BenchmarkModels(folder, str(folder / "llm"), str(folder / "llm2slm"))
    if (folder / "llm2slm" / "config.json").is_file():
        return models
    set_seed(0)
    config = preset_config(preset)
    llm_config = type(config.encoder)(**config.encoder.to_dict() | {"is_encoder_decoder": True, "dtype": "float32"})
    llm = AutoModelForSeq2SeqLM.from_config(llm_config).eval()
    llm.save_pretrained(models.llm)
    tokenizer_of(llm_config).save_pretrained(models.llm)
    del llm
    decoder: Any = slm_class(config.decoder).from_config(config.decoder).eval()
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        models.llm, decoder_model=decoder, fusion=config.fusion, shared_tokenizer=config.shared_tokenizer,
        encoder_dtype=torch.float32,
    )  # fmt: skip
    model.save_pretrained(models.llm2slm)
    return models


def tokenizer_of(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one word for each id, since CTranslate2 reads words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(3, config.vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
