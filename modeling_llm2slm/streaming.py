"""Pairs that are read while they are trained on, for data too large to index or to keep a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import IterableDataset, get_worker_info

from .data import ROW_ERROR, check_columns, file_format_of, parse_lines, reason_of, tell_bad_rows
from .sampling import grouped_order, seeded


class StreamedFeatures(IterableDataset):
    """
    An endless stream of features: pass after pass over the data, each in another order. Of several workers of a
    `DataLoader`, each turns its share of the rows into token ids.

    Args:
        source: See [`load_pairs`].
        prompt_column: See [`load_pairs`].
        answer_columns: The columns that hold answers; each gives every row a pair.
        features: Turns prompts and answers into features, see [`TextToText.features`]; it may leave some out.
        split: See [`load_pairs`].
        batch_size: The number of rows that are read together, over all processes.
        buffer: Rows are shuffled, and grouped by length, among this many.
        group_by_length: Put rows of similar length together, see [`grouped_order`].
        seed: Of the order.
        limit: Read only this many rows, from the top.
        skip_bad_rows: See [`load_pairs`].
    """

    def __init__(
        self,
        source: str,
        prompt_column: str,
        answer_columns: Sequence[str],
        features: Callable[[list[str], list[str]], dict[str, list[Any]]],
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
        self.columns = [prompt_column, *answer_columns]
        self.features = features
        self.split = split
        self.batch_size = batch_size
        self.buffer = max(buffer // batch_size, 1) * batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.limit = limit
        self.skip_bad_rows = skip_bad_rows
        first = next((row for row in self._rows() if ROW_ERROR not in row), None)
        if first is None:
            raise ValueError(f"{source} holds no rows.")
        check_columns(source, self.columns, list(first))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for epoch in count():
            pairs = islice(self._pairs(), number, None, workers)
            used = index = 0
            while chunk := list(islice(pairs, self.buffer)):
                for row in self._shuffled(chunk, seeded(self.seed, epoch, number, index)):
                    used += 1
                    yield row
                index += 1
            if used == 0:
                if workers == 1:
                    raise ValueError(f"{self.source}: no row can be used, see the warnings. Take other data.")
                return  # there is nothing for this worker, and there never will be

    def _shuffled(self, chunk: list[tuple[str, str]], generator: torch.Generator) -> Iterator[dict[str, Any]]:
        prompts, answers = zip(*chunk, strict=True)
        features = self.features(list(prompts), list(answers))
        order = torch.randperm(len(features["labels"]), generator=generator)
        if self.group_by_length:
            lengths = torch.tensor([len(labels) for labels in features["labels"]])
            order = grouped_order(order, lengths, self.batch_size, generator)
        for row in order.tolist():
            yield {name: rows[row] for name, rows in features.items()}

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(self._rows()):
            texts = [row.get(column) for column in self.columns]
            wrong = [column for column in self.columns if not isinstance(row.get(column), str)]
            if wrong:
                tell = row.get(ROW_ERROR) or f"the {wrong[0]} of row {number} is {row.get(wrong[0])!r}, not a text"
                tell_bad_rows(self.source, {number: tell}, self.skip_bad_rows)
                continue
            for answer in texts[1:]:
                yield texts[0], answer  # type: ignore[misc]

    def _rows(self) -> Iterator[dict[str, Any]]:
        path = Path(self.source).expanduser()
        if path.is_file() and ".jsonl" in path.suffixes:
            yield from parse_lines(path, self.limit)
            return
        file_format, options = file_format_of(path)
        if not path.is_file() and file_format is not None:
            raise FileNotFoundError(f"There is no data file {self.source}.")
        name, _, configuration = self.source.partition(":")
        try:
            rows = (
                load_dataset(file_format, data_files=str(path), split="train", streaming=True, **options)
                if path.is_file()
                else load_dataset(name, configuration or None, split=self.split, streaming=True)
            )
            yield from islice(rows, self.limit)
        except Exception as error:  # every reader has exceptions of its own
            raise ValueError(f"{self.source} cannot be read: {reason_of(error)}") from error
