"""The order that training reads its data in, a function of seed and epoch: a resumed run reads what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


def lengths(features: Mapping[str, Sequence[Sequence[Any]]]) -> list[int]:
    """What rows are grouped by: the tokens of prompt and answer together, as the model goes through both."""
    return [
        len(prompt) + len(answer) for prompt, answer in zip(features["input_ids"], features["labels"], strict=True)
    ]


def grouped_order(
    order: torch.Tensor, lengths: torch.Tensor, batch_size: int, generator: torch.Generator, chunk_batches: int = 50
) -> torch.Tensor:
    """
    An order in which rows of similar length are neighbours, and yet no length has its place.

    Rows are cut into chunks of `chunk_batches` batches, each chunk is sorted by length and cut into batches, and all
    batches are shuffled. The one with the longest row comes first, so that too little memory shows at once, and an
    incomplete one last.

    Args:
        order: Shuffled row numbers `(rows,)`.
        lengths: The length of each row `(rows,)`, by row number.
        batch_size: The number of rows that are read together.
        generator: Draws the order of the batches.
        chunk_batches: The number of batches in a chunk.

    Returns:
        The same row numbers in another order.
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
    Row numbers in an order drawn from seed and epoch alone.

    Args:
        rows: The number of rows.
        seed: Of the order.
        lengths: The length of each row `(rows,)`: groups rows as [`grouped_order`] does. None shuffles only.
        batch_size: The number of rows that a step is taken on, over all processes.

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
        """Says which epoch is next, as `accelerate` does."""
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
    """A generator for some small numbers, different for each of their combinations."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)
