"""Examples that are read while they are trained on, for data too large to index or to store a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import IterableDataset, get_worker_info

from ..files_llm2slm import first_line
from .bad_rows import check_columns, report_bad_rows, text_problem
from .causes import no_file
from .conversations import read_conversations, sources_of
from .formats import ROW_ERROR, file_format_of, parse_rows, unknown_format
from .order import grouped_order, lengths, seeded


@dataclass(kw_only=True)
class StreamSettings:
    """
    What a stream reads, and in which order.

    Args:
        prompt_column: Column that holds the prompts.
        target_columns: Columns that hold targets. Several columns give several examples per row.
        split: Split of a data set on the Hub. A file is one split.
        limit: Read only this many rows, from the top.
        skip_bad_rows: Skip rows that hold no text or that have a problem, with a warning that lists their numbers,
            instead of raising an error. Only the first pass reports them.
        batch_size: Effective batch size, over all processes.
        buffer: Number of examples that are shuffled, and grouped by length, together.
        group_by_length: Put examples of similar length together, see [`grouped_order`].
        seed: Seed of the order.
    """

    prompt_column: str = "prompt"
    target_columns: Sequence[str] = ("target",)
    split: str = "train"
    limit: int | None = None
    skip_bad_rows: bool = False
    batch_size: int
    buffer: int = 10_000
    group_by_length: bool = False
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """All columns that are read, the prompts first."""
        return [self.prompt_column, *self.target_columns]

    @property
    def chunk(self) -> int:
        """Number of examples that are shuffled together: whole batches, at least one."""
        return max(self.buffer // self.batch_size, 1) * self.batch_size


class StreamedFeatures(IterableDataset):
    """
    An endless stream of features: pass after pass over the data, each in another order. Each worker of a `DataLoader`
    tokenizes its share of the examples.

    Args:
        source: A file or a data set on the Hub, see [`load_examples`].
        features: Turns prompts and targets into features, see [`TextToText.features`].
        problems: Returns why each of some features cannot be used, or `None`, see [`TextToText.problems`].
        settings: What to read, and in which order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the data cannot be read, holds no rows or lacks a column.
    """

    def __init__(
        self,
        source: str,
        features: Callable[[list[str], list[str]], dict[str, list[Any]]],
        problems: Callable[[dict[str, list[Any]]], list[str | None]],
        settings: StreamSettings,
    ):
        self.source = source
        self.features = features
        self.problems = problems
        self.settings = settings
        names: dict[str, None] = {}
        for row in self._rows():
            if ROW_ERROR not in row:
                names |= dict.fromkeys(row)
                if not settings.skip_bad_rows or names.keys() >= set(self._sources(names).values()):
                    break
        if not names:
            raise ValueError(f"{source} holds no rows.")
        self.sources = self._sources(names)
        check_columns(source, list(self.sources.values()), list(names))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for epoch in count():
            bad: dict[int, str] = {}
            examples = islice(self._examples(bad), number, None, workers)
            used = index = 0
            while chunk := list(islice(examples, self.settings.chunk)):
                if number:
                    bad.clear()  # the first worker reads rows without text as well, and reports them
                features = self._usable(chunk, bad)
                self._report(bad, epoch)
                for row in self._shuffled(features, seeded(self.settings.seed, epoch, number, index)):
                    used += 1
                    yield row
                index += 1
            if not number:
                self._report(bad, epoch)
            if used == 0:
                if workers == 1:
                    raise ValueError(f"{self.source}: no row can be used, see the warnings. Take other data.")
                return  # this worker has no share in any pass

    def _sources(self, existing: dict[str, None]) -> dict[str, str]:
        return sources_of(self.settings.columns, existing)

    def _usable(self, chunk: list[tuple[int, str, str]], bad: dict[int, str]) -> dict[str, list[Any]]:
        """Return the features of numbered examples without those that have a problem, which is added to `bad`."""
        numbers, prompts, targets = map(list, zip(*chunk, strict=True))
        features = self.features(prompts, targets)
        problems = self.problems(features)
        for row, problem in zip(numbers, problems, strict=True):
            if problem is not None:
                bad[row] = f"row {row} {problem}"
        return {
            name: [row for row, problem in zip(rows, problems, strict=True) if problem is None]
            for name, rows in features.items()
        }

    def _report(self, bad: dict[int, str], epoch: int) -> None:
        if bad and epoch == 0:
            report_bad_rows(self.source, dict(sorted(bad.items())), self.settings.skip_bad_rows)
        bad.clear()

    def _shuffled(self, features: dict[str, list[Any]], generator: torch.Generator) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(features["labels"]), generator=generator)
        if self.settings.group_by_length:
            order = grouped_order(order, torch.tensor(lengths(features)), self.settings.batch_size, generator)
        for row in order.tolist():
            yield {name: rows[row] for name, rows in features.items()}

    def _examples(self, bad: dict[int, str]) -> Iterator[tuple[int, str, str]]:
        """Yield row number, prompt and target; add the problem of a bad row to `bad`, or raise it."""
        prompt_column, *target_columns = self.settings.columns
        for number, values in enumerate(self._rows()):
            row, problem = read_conversations(values, self.sources, number)
            problem = problem or text_problem(row, self.settings.columns, number)
            if problem is not None:
                bad[number] = problem
                if not self.settings.skip_bad_rows:
                    report_bad_rows(self.source, {number: problem}, skip=False)
                continue
            for column in target_columns:
                yield number, row[prompt_column], row[column]

    def _rows(self) -> Iterator[dict[str, Any]]:
        path = Path(self.source).expanduser()
        file_format = file_format_of(path)
        if path.is_file() and file_format not in ("parquet", None):
            yield from parse_rows(path, self.settings.limit)
            return
        if not path.is_file() and file_format is not None:
            raise no_file(self.source, "data file")
        if path.is_file() and file_format is None:
            raise ValueError(unknown_format(self.source))
        name, _, configuration = self.source.partition(":")
        try:
            rows = (
                load_dataset("parquet", data_files=str(path), split="train", streaming=True)
                if path.is_file()
                else load_dataset(name, configuration or None, split=self.settings.split, streaming=True)
            )
            yield from islice(rows, self.settings.limit)
        except Exception as error:  # each reader raises its own exceptions
            raise ValueError(f"{self.source} cannot be read: {first_line(error)}") from error
