"""How training forms its batches: how many examples a step takes, and what the collator gets of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


def effective_batch_size(arguments: TrainingArguments) -> int:
    """Return the number of examples in a step of the optimizer, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def data_seed(arguments: TrainingArguments) -> int:
    """Return the seed that decides the order of the data."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


@dataclass
class WithoutLength:
    """Removes `length`, which batches are grouped by, from the features that a collator pads for the model."""

    collator: Any

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return self.collator([{name: row for name, row in one.items() if name != "length"} for one in features])
