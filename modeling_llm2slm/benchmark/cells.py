"""The cells of a benchmark: sizes of prompts and outputs to measure."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..data.parsing import read_yaml
from ..settings import BEAMS, LENGTH, OUTPUT_LENGTH, Settings, option, shown, unknown_name


FIRST_ID = 10  # lower token ids are special
MAX_CELLS = 40
EXAMPLE = "{preset: t5-large_gpt2, prompt: 64, output: 64}"


@dataclass(frozen=True)
class Cell(Settings):
    """One measurement: random prompts, and outputs of exactly `output` tokens."""

    prompt: int = option(64, "Length of a prompt, in tokens of the model that reads it.", **LENGTH)
    output: int = option(64, "Length of an output, in tokens.", **OUTPUT_LENGTH)
    batch: int = option(1, "Prompts per batch.", minimum=1, limit=2**16)
    beams: int = option(1, "Beams of the beam search; 1 is greedy.", **BEAMS)
    preset: str = option("", "Name of a preset with random weights; empty for given checkpoints.")
    contestants: tuple[str, ...] = option((), "Names of contestants; empty for all that are installed.")
    repeats: int = option(5, "Rounds, in each of which every contestant generates once.", minimum=1, limit=1000)

    @property
    def key(self) -> str:
        """Its name in the result."""
        return f"{self.preset or 'given'} {self.prompt}/{self.output} batch {self.batch} beams {self.beams}"

    def ids(self, vocab_size: int) -> torch.Tensor:
        """Return the prompts `(batch, prompt)`, the same for all models with this vocabulary."""
        generator = torch.Generator().manual_seed(self.prompt)
        return torch.randint(FIRST_ID, vocab_size, (self.batch, self.prompt), generator=generator)


def load_sweep(path: str | Path) -> list[Cell]:
    """
    Load the cells of a YAML file: a list `cells` of mappings with the fields of [`Cell`].

    Raises:
        ValueError: If the file has no such list, the list has no cell or more than 40, or a cell has an unknown field
            or a value that cannot be measured.
    """
    content = read_yaml(path)
    rows = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or len(content) > 1:
        raise ValueError(
            f"{path} is not a sweep: it must have `cells`, a list of mappings such as {EXAMPLE}, and nothing else."
        )
    if len(rows) > MAX_CELLS:
        raise ValueError(f"{path} has {len(rows)} cells; the most is {MAX_CELLS}.")
    return [_read_cell(row, f"{path} is not a sweep: cell {number}") for number, row in enumerate(rows, 1)]


def _read_cell(row: Any, where: str) -> Cell:
    """Return a cell of a sweep; `where` names it in errors."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {shown(row)}, but it must map names to values, such as {EXAMPLE}.")
    known = [field.name for field in fields(Cell)]
    unknown = next((name for name in row if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{where}: {unknown_name('A cell', unknown, known)}")
    try:
        cell = Cell(**row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return replace(cell, contestants=tuple(cell.contestants))
