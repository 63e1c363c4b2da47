"""Models of their own: a part of a composite checkpoint, or an LLM or SLM alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_llm2slm.configuration_llm2slm import LLM2SLMConfig
from modeling_llm2slm.parts_llm2slm import slm_class
from modeling_llm2slm.states.loading import load, load_model, one_sentence

from .build import check_part
from .compose import VOCABULARIES
from .output import dtype_of


def load_plain(source: str | Path) -> PreTrainedModel:
    """
    Load a decoder-only or encoder-decoder model with its head.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is an LLM-to-SLM checkpoint, if it is quantized, or if a weight is not finite.
    """
    config = plain_config(source)
    check_part(slm_class(config), config, str(source), "LLM")
    model: PreTrainedModel = load_model(slm_class(config), source)
    return model


def plain_config(source: str | Path) -> PreTrainedConfig:
    """Return the config of a model that [`load_plain`] can load, or raise `ValueError`."""
    config: PreTrainedConfig = load(AutoConfig, source)
    if isinstance(config, LLM2SLMConfig):
        raise ValueError(f"{source} is an LLM-to-SLM checkpoint: take its LLM, or its SLM (`llm2slm convert split`).")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantized: take the checkpoint that it was made from.")
    return config


def tokenizer_of(source: str | Path) -> PreTrainedTokenizerBase | None:
    """
    Return the tokenizer of a model, or `None`.

    transformers may load a tokenizer of special tokens alone from a folder without a vocabulary; it is ignored.
    """
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in VOCABULARIES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = load(AutoTokenizer, source)
    except OSError:
        return None
    return tokenizer


def part_of_state(
    checkpoint: str | Path, auto_class: Any, config: PreTrainedConfig, state: dict[str, torch.Tensor]
) -> Any:
    """
    Return a part as a model, with the weights in `state`, by their names in the part.

    Raises:
        OSError: If a weight is missing or has another shape.
        ValueError: If the auto class knows no model of this kind.
    """
    if type(config) not in auto_class._model_mapping:
        raise ValueError(f"{checkpoint} has a {config.model_type} part, which can be neither LLM nor SLM.")
    kind = auto_class._model_mapping[type(config)]
    with one_sentence(checkpoint):
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype_of(state), output_loading_info=True
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[0]
        raise OSError(f"{checkpoint} is incomplete: its {config.model_type} part lacks {missing}.")
    return model
