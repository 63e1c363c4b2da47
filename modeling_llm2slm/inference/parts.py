"""The parts of a model and the number of their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class Part:
    """
    A part of a model.

    Args:
        name: Its name, such as "LLM".
        config: Its config; `None` if it has none of its own.
        parameters: Number of parameters.
        dtype: dtype of its weights.
    """

    name: str
    config: Any
    parameters: int
    dtype: str


def part_of(name: str, module: torch.nn.Module, config: Any = None) -> Part:
    """Describe a module as a part."""
    dtype = module.dtype if isinstance(module, PreTrainedModel) else next(module.parameters()).dtype
    return Part(name, config, count_parameters(module), str(dtype).removeprefix("torch."))


def composite_parts(model: Any) -> list[Part]:
    """Return the parts of an LLM-to-SLM model."""
    encoder, config = model.encoder, model.config
    return [
        part_of("LLM", encoder.llm, config.encoder),
        *(part_of(name.replace("_", " "), module) for name, module in encoder.new_modules().items()),
        part_of("SLM", model.decoder, config.decoder),
    ]


def decoding_modules(model: Any) -> list[Any]:
    """Return the modules that every output token passes through."""
    return [model.get_decoder(), model.get_output_embeddings()] if model.config.is_encoder_decoder else [model]


def count_parameters(*modules: torch.nn.Module | None) -> int:
    """Count the parameters of modules; tied ones count once."""
    tensors = {tensor for module in modules if module is not None for tensor in module.parameters()}
    return sum(tensor.numel() for tensor in tensors)
