"""
Many prompts, answered fast: batches of similar length, each prompt read once, the next batch read while the present
one is answered; and answers kept as they come, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..data.order import seeded


if TYPE_CHECKING:
    from .text_to_text import TextToText

Item = TypeVar("Item")
Result = TypeVar("Result")
Draw = tuple[int, int]  # the number of a prompt, and which of its answers


@dataclass(frozen=True)
class BatchLimits:
    """
    How much goes through a model at once.

    Args:
        rows: At most this many prompts.
        tokens: At most this many prompt tokens, padding included, but one prompt always (default: any number).
    """

    rows: int = 32
    tokens: int | None = None

    def cut(self, items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
        """Cuts items, the longest first, into batches."""
        start = 0
        while start < len(items):
            fitting = self.rows if self.tokens is None else self.tokens // max(length(items[start]), 1)
            batch = items[start : start + max(min(self.rows, fitting), 1)]
            yield batch
            start += len(batch)


class PromptTable:
    """
    Which prompts there are. Equal ones are read once; they are answered once, too, unless answers are sampled.

    Args:
        sampled: Whether every occurrence of a prompt has an answer of its own.

    Attributes:
        rows: The first row of each different prompt.
        lengths: Its length in tokens.
        draws: The answer of each row.
    """

    def __init__(self, sampled: bool = False):
        self.sampled = sampled
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.draws: list[Draw] = []
        self._counts: list[int] = []
        self._keys: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, prompts: Sequence[str], measure: Callable[[list[int]], Sequence[int]]) -> None:
        """Adds rows; `measure` is asked for the lengths of those that are new, by their place in `prompts`."""
        new: list[int] = []
        for place, prompt in enumerate(prompts):
            key = hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
            number = self._numbers.setdefault(key, len(self._keys))
            if number == len(self._keys):
                self._keys.append(key)
                self._counts.append(0)
                self.rows.append(len(self.draws))
                new.append(place)
            if self.sampled or not self._counts[number]:
                self._counts[number] += 1
            self.draws.append((number, self._counts[number] - 1))
        self.lengths += measure(new)

    def key(self, draw: Draw) -> str:
        """What an answer is known by, whatever its row is."""
        number, which = draw
        return f"{self._keys[number]}-{which}" if self.sampled else self._keys[number]

    def fingerprint(self) -> str:
        """A hash of all prompts in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for number, _ in self.draws:
            digest.update(self._keys[number].encode())
        return digest.hexdigest()

    def answers(self) -> int:
        """The number of different answers."""
        return sum(self._counts)

    def batches(
        self, limits: BatchLimits, known: Collection[str] = (), rank: int = 0, world: int = 1
    ) -> list[list[Draw]]:
        """
        The answers that are to be written, those of prompts that are read together in one list, the longest first.
        What is sampled depends on what it is drawn with, so such a list has known answers too, which [`pieces`] leaves
        out.

        Args:
            limits: Of a batch of prompts.
            known: Keys of answers to leave out.
            rank: The number of this process.
            world: The number of processes that share the work.
        """
        order = sorted(range(len(self.rows)), key=lambda number: -self.lengths[number])
        # Shares are cut from all prompts, not from what is missing: another process may have begun.
        own = list(limits.cut(order, self._length))[rank::world]
        if not self.sampled:
            missing = [number for batch in own for number in batch if self.key((number, 0)) not in known]
            own = list(limits.cut(missing, self._length))
        batches = [[(number, which) for number in batch for which in range(self._counts[number])] for batch in own]
        return [batch for batch in batches if any(self.pieces(batch, limits, known))]

    def pieces(
        self, batch: Sequence[Draw], limits: BatchLimits, known: Collection[str] = ()
    ) -> Iterator[Sequence[Draw]]:
        """
        Cuts a batch into what is answered at once, as of a prompt that is drawn often there may be many answers, and
        leaves out the pieces that are known.
        """
        for piece in limits.cut(batch, lambda draw: self._length(draw[0])):
            if any(self.key(draw) not in known for draw in piece):
                yield piece

    def _length(self, number: int) -> int:
        return self.lengths[number]


def answer(
    text_to_text: TextToText,
    table: PromptTable,
    batches: Sequence[Sequence[Draw]],
    features: Callable[[list[int]], dict[str, list[list[int]]]],
    limits: BatchLimits,
    overlap: bool | None = None,
    seed: int | None = None,
    known: Collection[str] = (),
    **generate_kwargs: Any,
) -> Iterator[tuple[Sequence[Draw], list[list[int]]]]:
    """
    Answers prompts, batch by batch.

    Args:
        text_to_text: The model.
        table: The prompts.
        batches: What is to be answered, see [`PromptTable.batches`].
        features: Gives the features, see [`TextToText.features`], of rows by their numbers.
        limits: How much is answered at once.
        overlap: Read a batch while the one before it is answered, in a thread. It changes no answer. Default: where
            the model is on a device of its own, or leaves a core of the CPU free.
        seed: Makes sampled answers repeatable, also where a run was interrupted.
        known: Keys of answers to leave out.
        generate_kwargs: Arguments of `generate()`.

    Yields:
        Answers as `(prompt, which)`, and the token ids of each, the end token included.
    """

    def read(batch: Sequence[Draw]) -> dict[str, Any]:
        return text_to_text.read(features([table.rows[number] for number in _numbers(batch)]))

    for batch, inputs in zip(batches, one_ahead(read, batches, _overlap(text_to_text, overlap)), strict=True):
        place = {number: place for place, number in enumerate(_numbers(batch))}
        for piece in table.pieces(batch, limits, known):
            if seed is not None:
                # By the row, so that what is left of an interrupted run is drawn as it would have been.
                number, which = piece[0]
                torch.manual_seed(seeded(seed, table.rows[number], which).initial_seed())
            chosen = _take(inputs, [place[number] for number, _ in piece])
            yield piece, text_to_text.write(chosen, **generate_kwargs)


def is_sampled(text_to_text: TextToText, generate_kwargs: Mapping[str, Any]) -> bool:
    """Whether two answers to one prompt may differ."""
    default = getattr(getattr(text_to_text.model, "generation_config", None), "do_sample", False)
    return bool(generate_kwargs.get("do_sample", default))


def one_ahead(function: Callable[[Item], Result], items: Sequence[Item], overlap: bool) -> Iterator[Result]:
    """Maps a function; with `overlap` it works on the next item, in a thread, while the caller has the present one."""
    if not overlap or len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        present: Future[Result] = pool.submit(function, items[0])
        for item in islice(items, 1, None):
            result = present.result()
            present = pool.submit(function, item)
            yield result
            del result  # or the states of three batches would be in memory
        yield present.result()


def _overlap(text_to_text: TextToText, wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    device = getattr(text_to_text.model, "device", None)
    return getattr(device, "type", "cpu") != "cpu" or torch.get_num_threads() < _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbers(batch: Sequence[Draw]) -> list[int]:
    return list(dict.fromkeys(number for number, _ in batch))


def _take(values: Any, rows: list[int]) -> Any:
    """Rows of all tensors `(B, ...)` in a mapping, and in the mappings in it."""
    if isinstance(values, torch.Tensor):
        if rows == list(range(len(values))):
            return values
        return values.index_select(0, torch.tensor(rows, device=values.device))
    if isinstance(values, Mapping):
        taken = {name: _take(value, rows) for name, value in values.items()}
        return taken if type(values) is dict else type(values)(**taken)
    return values


class OutputParts:
    """
    Answers as they come, one file of JSON lines for each process, with the settings they were made with before them. A
    line holds the answers of a batch.

    Args:
        output: The file that is to hold all answers; parts lie beside it.
        settings: What an answer depends on beside its prompt.
        rank: The number of this process.
        overwrite: Remove what other settings have left.

    Attributes:
        answers: Each answer so far by its key.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the file was left by a run with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], rank: int = 0, overwrite: bool = False):
        self.output = output
        self.settings = json.loads(json.dumps(settings))
        self.path = output.with_name(f"{output.name}.part-{rank}" if rank else f"{output.name}.part")
        if overwrite:
            self.remove()
        self.answers = self.read_all()
        self._empty = self._cut_torn_line() == 0

    def keep(self, answers: Mapping[str, str]) -> None:
        """Adds the answers of a batch: all of them, or none if the process dies."""
        lines = [self.settings, answers] if self._empty else [answers]
        rest = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        advice = "Answers before it are kept: make room, and repeat the command."
        with writing(self.path, advice), self.path.open("ab", buffering=0) as file:
            while rest:
                rest = rest[file.write(rest) :]
        self._empty = False
        self.answers.update(answers)

    def read_all(self) -> dict[str, str]:
        """All answers so far, those of other processes included, by their keys."""
        answers: dict[str, str] = {}
        for path in self._paths():
            lines = self._whole_lines(path)
            if next(lines, self.settings) != self.settings:
                raise ValueError(
                    f"{path} was left by a run with another model, other data or other settings. Repeat these, remove "
                    "the file, or add --overwrite."
                )
            for line in lines:
                answers.update(line)
        return answers

    def remove(self) -> None:
        """Removes the files."""
        for path in self._paths():
            path.unlink(missing_ok=True)  # another process that finishes may be as far

    def _paths(self) -> list[Path]:
        return [path for path in sorted(self.output.parent.glob("*.part*")) if self._is_part(path.name)]

    def _is_part(self, name: str) -> bool:
        rest = name.removeprefix(f"{self.output.name}.part")
        return rest != name and (not rest or rest[0] == "-" and rest[1:].isdigit())

    def _whole_lines(self, path: Path) -> Iterator[dict[str, str]]:
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a killed run may have written half a line
                    yield json.loads(line)

    def _cut_torn_line(self) -> int:
        """Cuts off what a killed run has not finished, and returns how many bytes are left."""
        if not self.path.exists():
            return 0
        with self.path.open("rb+") as file:
            end = sum(len(line) for line in file if line.endswith(b"\n"))
            return file.truncate(end)


def one_line(text: str) -> str:
    """The text with a space in the place of each line end, of whatever kind."""
    return " ".join(f"{text}.".splitlines())[:-1]  # with a line after the last end, or that would get no space


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Says of what cannot be written which file it is, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}. {advice}") from error
