"""The order in which training reads its examples: a function of seed and epoch, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


def lengths(features: Mapping[str, Sequence[Sequence[Any]]]) -> list[int]:
    """Return the length that examples are grouped by: prompt and target tokens together."""
    return [
        len(prompt) + len(target) for prompt, target in zip(features["input_ids"], features["labels"], strict=True)
    ]


def grouped_order(
    order: torch.Tensor, lengths: torch.Tensor, batch_size: int, generator: torch.Generator, chunk_batches: int = 50
) -> torch.Tensor:
    """
    Reorder examples so that neighbours have similar lengths, while the lengths of batches stay in random order.

    Examples are cut into chunks of `chunk_batches` batches. Each chunk is sorted by length and cut into batches, and
    all batches are shuffled. The batch with the longest example comes first, so that a lack of memory shows at once,
    and an incomplete batch comes last.

    Args:
        order: Shuffled example numbers `(examples,)`.
        lengths: Length of each example `(examples,)`, by its number.
        batch_size: Number of examples that are read together.
        generator: Shuffles the batches.
        chunk_batches: Number of batches in a chunk.

    Returns:
        The same example numbers in another order.
    """
    batches = [
        batch
        for chunk in order.split(batch_size * chunk_batches)
        for batch in chunk[lengths[chunk].argsort(descending=True, stable=True)].split(batch_size)
    ]
    rest = [batch for batch in batches if len(batch) < batch_size]
    batches = [batch for batch in batches if len(batch) == batch_size]
    batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    if batches:
        longest = max(range(len(batches)), key=lambda index: int(lengths[batches[index]].max()))
        batches[0], batches[longest] = batches[longest], batches[0]
    return torch.cat([*batches, *rest]) if batches or rest else order


class EpochSampler(Sampler[int]):
    """
    Yields example numbers in an order that depends on seed and epoch alone.

    Args:
        rows: Number of examples.
        seed: Seed of the order.
        lengths: Length of each example `(examples,)`, to group them as [`grouped_order`] does. `None` only shuffles.
        batch_size: Effective batch size, over all processes.

    Attributes:
        epoch: The epoch whose order is next.
    """

    def __init__(self, rows: int, seed: int, lengths: torch.Tensor | None = None, batch_size: int = 1):
        self.rows = rows
        self.seed = seed
        self.lengths = lengths
        self.batch_size = batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch; `accelerate` calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = seeded(self.seed, self.epoch)
        order = torch.randperm(self.rows, generator=generator)
        if self.lengths is not None:
            order = grouped_order(order, self.lengths, self.batch_size, generator)
        return iter(order.tolist())


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator that is seeded differently for each combination of small numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)
