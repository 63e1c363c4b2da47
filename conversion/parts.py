"""A part of a composite checkpoint as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_llm2slm.states.loading import one_sentence

from .output import dtype_of


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
