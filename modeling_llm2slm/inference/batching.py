"""Batches of prompts of similar length, in which equal prompts are read once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch


Item = TypeVar("Item")
Result = TypeVar("Result")
OutputId = tuple[int, int]  # the index of a distinct prompt, and the index of one of its samples


@dataclass(frozen=True)
class BatchLimits:
    """
    The size of a batch.

    Args:
        rows: Most prompts in a batch.
        tokens: Most prompt tokens in a batch, padding included. A longer prompt is a batch of its own. Default: no
            limit.
    """

    rows: int = 32
    tokens: int | None = None

    def cut(self, items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
        """Cut items, sorted from long to short, into batches."""
        start = 0
        while start < len(items):
            fitting = self.rows if self.tokens is None else self.tokens // max(length(items[start]), 1)
            batch = items[start : start + max(min(self.rows, fitting), 1)]
            yield batch
            start += len(batch)


class PromptTable:
    """
    The distinct prompts among rows. Each is read once, and generated for once unless outputs are sampled.

    Args:
        sampled: Whether each row has an output of its own, also where its prompt occurred before.

    Attributes:
        rows: The first row of each distinct prompt.
        lengths: The length of each distinct prompt, in tokens.
        outputs: The id of the output of each row.
    """

    def __init__(self, sampled: bool = False):
        self.sampled = sampled
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.outputs: list[OutputId] = []
        self._counts: list[int] = []
        self._keys: list[str] = []
        self._indices: dict[str, int] = {}

    def add(self, prompts: Sequence[str], measure: Callable[[list[int]], Sequence[int]]) -> None:
        """Add rows. `measure` gets the indices in `prompts` of those that are new, and returns their lengths."""
        new: list[int] = []
        for index, prompt in enumerate(prompts):
            key = hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
            prompt_index = self._indices.setdefault(key, len(self._keys))
            if prompt_index == len(self._keys):
                self._keys.append(key)
                self._counts.append(0)
                self.rows.append(len(self.outputs))
                new.append(index)
            if self.sampled or not self._counts[prompt_index]:
                self._counts[prompt_index] += 1
            self.outputs.append((prompt_index, self._counts[prompt_index] - 1))
        self.lengths += measure(new)

    def key(self, output: OutputId) -> str:
        """Return the key under which an output is stored. It does not depend on the row."""
        prompt_index, sample_index = output
        return f"{self._keys[prompt_index]}-{sample_index}" if self.sampled else self._keys[prompt_index]

    def fingerprint(self) -> str:
        """Return a hash of all prompts in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt_index, _ in self.outputs:
            digest.update(self._keys[prompt_index].encode())
        return digest.hexdigest()

    def output_count(self) -> int:
        """Return the number of distinct outputs."""
        return sum(self._counts)

    def batches(
        self, limits: BatchLimits, known: Collection[str] = (), rank: int = 0, world: int = 1
    ) -> list[list[OutputId]]:
        """
        Return the outputs to generate, from long prompts to short ones. A list holds those whose prompts are read
        together. A sampled output depends on its batch, so a list contains known outputs too; [`pieces`] leaves them
        out.

        Args:
            limits: Size of a batch of prompts.
            known: Keys of outputs to leave out.
            rank: Number of this process.
            world: Number of processes that share the work.
        """
        order = sorted(range(len(self.rows)), key=lambda prompt_index: -self.lengths[prompt_index])
        # Shares are cut from all prompts, not from the missing ones: another process may have started earlier.
        own = list(limits.cut(order, self._length))[rank::world]
        if not self.sampled:
            mine = [prompt_index for batch in own for prompt_index in batch]
            missing = [prompt_index for prompt_index in mine if self.key((prompt_index, 0)) not in known]
            own = list(limits.cut(missing, self._length))
        batches = [[output for prompt_index in batch for output in self._samples(prompt_index)] for batch in own]
        return [batch for batch in batches if any(self.pieces(batch, limits, known))]

    def pieces(
        self, batch: Sequence[OutputId], limits: BatchLimits, known: Collection[str] = ()
    ) -> Iterator[Sequence[OutputId]]:
        """
        Cut a batch into pieces that are generated together, since a prompt that is sampled often has many outputs, and
        leave out the pieces that are known.
        """
        for piece in limits.cut(batch, lambda output: self._length(output[0])):
            if any(self.key(output) not in known for output in piece):
                yield piece

    def _samples(self, prompt_index: int) -> list[OutputId]:
        return [(prompt_index, sample_index) for sample_index in range(self._counts[prompt_index])]

    def _length(self, prompt_index: int) -> int:
        return self.lengths[prompt_index]


def prompts_of(batch: Sequence[OutputId]) -> list[int]:
    """Return the indices of the distinct prompts of a batch, in order."""
    return list(dict.fromkeys(prompt_index for prompt_index, _ in batch))


def take_rows(values: Any, rows: list[int]) -> Any:
    """Select rows of all tensors `(B, ...)` in a mapping, and in the mappings that it contains."""
    if isinstance(values, torch.Tensor):
        if rows == list(range(len(values))):
            return values
        return values.index_select(0, torch.tensor(rows, device=values.device))
    if isinstance(values, Mapping):
        taken = {name: take_rows(value, rows) for name, value in values.items()}
        return taken if type(values) is dict else type(values)(**taken)
    return values


def one_ahead(function: Callable[[Item], Result], items: Sequence[Item], overlap: bool) -> Iterator[Result]:
    """Map a function. With `overlap`, a thread works on the next item while the caller uses the current result."""
    if not overlap or len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        current: Future[Result] = pool.submit(function, items[0])
        for item in islice(items, 1, None):
            result = current.result()
            current = pool.submit(function, item)
            yield result
            del result  # or the prompt states of three batches would be in memory
        yield current.result()


def can_overlap(device: torch.device | None) -> bool:
    """Return whether reading ahead saves time: on an accelerator, or where torch leaves a core of the CPU free."""
    return getattr(device, "type", "cpu") != "cpu" or torch.get_num_threads() < _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
