"""Pairs that are read while they are trained on, for data too large to index or to keep a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import IterableDataset, get_worker_info

from .loading import (
    ROW_ERROR,
    check_columns,
    file_format_of,
    first_line,
    is_text,
    parse_lines,
    reading_options,
    report_bad_rows,
)
from .order import grouped_order, lengths, seeded


class StreamedFeatures(IterableDataset):
    """
    An endless stream of features: pass after pass over the data, each in another order. Of several workers of a
    `DataLoader`, each turns its share of the rows into token ids.

    Args:
        source: See [`load_examples`].
        prompt_column: See [`load_examples`].
        target_columns: The columns that hold answers; each gives every row a pair.
        features: Turns prompts and answers into features, see [`TextToText.features`].
        problems: Says of each of some features why it cannot be used, or None, see [`TextToText.problems`].
        split: See [`load_examples`].
        batch_size: The number of rows that a step is taken on, over all processes.
        buffer: Rows are shuffled, and grouped by length, among this many.
        group_by_length: Put rows of similar length together, see [`grouped_order`].
        seed: Of the order.
        limit: Read only this many rows, from the top.
        skip_bad_rows: Leave out rows that hold no text or that have a problem, with a warning that numbers them, in
            place of an error that does. The first pass tells what it leaves out.
    """

    def __init__(
        self,
        source: str,
        prompt_column: str,
        target_columns: Sequence[str],
        features: Callable[[list[str], list[str]], dict[str, list[Any]]],
        problems: Callable[[dict[str, list[Any]]], list[str | None]],
        *,
        split: str = "train",
        batch_size: int,
        buffer: int = 10_000,
        group_by_length: bool = False,
        seed: int = 0,
        limit: int | None = None,
        skip_bad_rows: bool = False,
    ):
        self.source = source
        self.columns = [prompt_column, *target_columns]
        self.features = features
        self.problems = problems
        self.split = split
        self.batch_size = batch_size
        self.buffer = max(buffer // batch_size, 1) * batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.limit = limit
        self.skip_bad_rows = skip_bad_rows
        names: dict[str, None] = {}
        for row in self._rows():
            if ROW_ERROR not in row:
                names |= dict.fromkeys(row)
                if not skip_bad_rows or names.keys() >= set(self.columns):
                    break
        if not names:
            raise ValueError(f"{source} holds no rows.")
        check_columns(source, self.columns, list(names))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for epoch in count():
            bad: dict[int, str] = {}
            pairs = islice(self._pairs(bad), number, None, workers)
            used = index = 0
            while chunk := list(islice(pairs, self.buffer)):
                if number:
                    bad.clear()  # rows without texts are told by the first worker, which reads them as well
                features = self._usable(chunk, bad)
                self._tell(bad, epoch)
                for row in self._shuffled(features, seeded(self.seed, epoch, number, index)):
                    used += 1
                    yield row
                index += 1
            if not number:
                self._tell(bad, epoch)
            if used == 0:
                if workers == 1:
                    raise ValueError(f"{self.source}: no row can be used, see the warnings. Take other data.")
                return  # there is nothing for this worker, and there never will be

    def _usable(self, chunk: list[tuple[int, str, str]], bad: dict[int, str]) -> dict[str, list[Any]]:
        """The features of numbered pairs without those that have a problem, which is noted in `bad`."""
        numbers, prompts, answers = map(list, zip(*chunk, strict=True))
        features = self.features(prompts, answers)
        problems = self.problems(features)
        for row, problem in zip(numbers, problems, strict=True):
            if problem is not None:
                bad[row] = f"row {row} {problem}"
        return {
            name: [row for row, problem in zip(rows, problems, strict=True) if problem is None]
            for name, rows in features.items()
        }

    def _tell(self, bad: dict[int, str], epoch: int) -> None:
        if bad and epoch == 0:
            report_bad_rows(self.source, dict(sorted(bad.items())), self.skip_bad_rows)
        bad.clear()

    def _shuffled(self, features: dict[str, list[Any]], generator: torch.Generator) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(features["labels"]), generator=generator)
        if self.group_by_length:
            order = grouped_order(order, torch.tensor(lengths(features)), self.batch_size, generator)
        for row in order.tolist():
            yield {name: rows[row] for name, rows in features.items()}

    def _pairs(self, bad: dict[int, str]) -> Iterator[tuple[int, str, str]]:
        """Each pair with the number of its row; what is wrong with a row is noted in `bad`, or an error."""
        for number, row in enumerate(self._rows()):
            wrong = [column for column in self.columns if not is_text(row.get(column))]
            if wrong:
                bad[number] = (
                    row.get(ROW_ERROR) or f"the {wrong[0]} of row {number} is {row.get(wrong[0])!r}, not a text"
                )
                if not self.skip_bad_rows:
                    report_bad_rows(self.source, {number: bad[number]}, skip=False)
                continue
            for column in self.columns[1:]:
                yield number, row[self.columns[0]], row[column]

    def _rows(self) -> Iterator[dict[str, Any]]:
        path = Path(self.source).expanduser()
        if path.is_file() and ".jsonl" in path.suffixes:
            yield from parse_lines(path, self.limit)
            return
        file_format = file_format_of(path)
        if not path.is_file() and file_format is not None:
            raise FileNotFoundError(f"There is no data file {self.source}.")
        name, _, configuration = self.source.partition(":")
        try:
            rows = (
                load_dataset(file_format, data_files=str(path), split="train", streaming=True, **reading_options(path))
                if path.is_file()
                else load_dataset(name, configuration or None, split=self.split, streaming=True)
            )
            yield from islice(rows, self.limit)
        except Exception as error:  # every reader has exceptions of its own
            raise ValueError(f"{self.source} cannot be read: {first_line(error)}") from error
