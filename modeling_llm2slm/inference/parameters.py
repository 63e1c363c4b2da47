"""Which parameters of a model run at each step, and how many there are."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoding_modules(slm: PreTrainedModel) -> list[nn.Module]:
    """Return the modules of an SLM that run at each step; an encoder of its own runs once per prompt."""
    return [slm.get_decoder(), slm.get_output_embeddings()] if slm.config.is_encoder_decoder else [slm]


def count_parameters(*modules: nn.Module | None) -> int:
    """Return the number of parameters in modules; a shared one counts once."""
    parameters = {parameter for module in modules if module is not None for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in parameters)
