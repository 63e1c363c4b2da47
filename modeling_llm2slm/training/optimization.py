"""Optimizers whose learning rate may differ between parts of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Adafactor
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names


# As in `Trainer`: weight decay applies to matrices, not to biases and norms.
_WITHOUT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    learning_rate_mapping: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """
    Return groups of all trained parameters, for any optimizer of torch or transformers.

    Args:
        model: The model. In an [`LLM2SLMForConditionalGeneration`] the names of parameters begin with
            `encoder.projector`, `encoder.prompt_embedding`, `decoder` (the SLM) and, if it trains, `encoder.llm`.
        learning_rate: Learning rate of all parameters that no pattern matches.
        learning_rate_mapping: Regular expressions, searched for in the names of parameters, each with a learning rate;
            the first that matches counts.
        weight_decay: Weight decay of matrices; biases and norms have none.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: If a learning rate is not a number, or a pattern is not a regular expression or matches no trained
            parameter.

    Example:

    ```python
    groups = parameter_groups(model, 5e-5, {"projector|prompt_embedding": 1e-3}, weight_decay=0.01)
    Seq2SeqTrainer(model, optimizers=(torch.optim.AdamW(groups), None), ...)
    ```
    """
    mapping = {_compiled(pattern): rate for pattern, rate in learning_rates(learning_rate_mapping or {}).items()}
    decaying = set(get_parameter_names(model, ALL_LAYERNORM_LAYERS, _WITHOUT_DECAY))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matched = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pattern = next((pattern for pattern in mapping if pattern.search(name)), None)
            matched.add(pattern)
            own_rate = mapping[pattern] if pattern is not None else learning_rate
            groups.setdefault((own_rate, weight_decay if name in decaying else 0.0), []).append(parameter)
    for pattern in mapping:
        if pattern not in matched:
            raise ValueError(
                f"learning_rate_mapping has {pattern.pattern!r}, which matches no parameter that trains and that no "
                "pattern before it matches. The parts are named projector, prompt_embedding and decoder."
            )
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def learning_rates(mapping: Mapping[str, Any]) -> dict[str, float]:
    """Return the learning rates as numbers, since YAML 1.1 reads `1e-3` as text; raise `ValueError` for others."""
    rates = {}
    for pattern, value in mapping.items():
        try:
            rates[pattern] = float(value)
        except (TypeError, ValueError):
            rates[pattern] = math.nan
        if not math.isfinite(rates[pattern]):
            raise ValueError(
                f"learning_rate_mapping has {value!r} for {pattern!r}, but it must be a number such as 1.0e-3."
            )
    return rates


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"learning_rate_mapping has {pattern!r}, which is not a regular expression: {error}."
        ) from error


def relative_adafactor(groups: list[dict[str, Any]]) -> Adafactor:
    """
    Return Adafactor with steps relative to the size of each parameter, which training a T5 from scratch needs.

    `optim="adafactor"` of `Trainer` sets `scale_parameter=False`: embeddings and matrices then get steps of the same
    size, with which a T5 does not learn.
    """
    return Adafactor(groups, lr=groups[0]["lr"], scale_parameter=True, relative_step=False)
