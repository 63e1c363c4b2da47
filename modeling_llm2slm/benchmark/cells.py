"""The cells of a benchmark: sizes of prompts and outputs to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.parsing import read_yaml


FIRST_ID = 10  # lower token ids are special
MAX_CELLS = 40


@dataclass(frozen=True)
class Cell:
    """
    One measurement: random prompts, and outputs of exactly `output` tokens.

    Args:
        prompt: Length of a prompt, in tokens of the model that reads it.
        output: Length of an output, in tokens.
        batch: Prompts per batch.
        beams: Beams of the beam search; 1 is greedy.
        preset: Name of a preset with random weights; empty for given checkpoints.
        contestants: Names of contestants; empty for all that are installed.
        repeats: Rounds, in each of which every contestant generates once.
    """

    prompt: int = 64
    output: int = 64
    batch: int = 1
    beams: int = 1
    preset: str = ""
    contestants: tuple[str, ...] = ()
    repeats: int = 5

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
        ValueError: If the file has no such list, the list has more than 40 cells, or a cell has an unknown field.
    """
    try:
        rows = read_yaml(path)["cells"]
        cells = [Cell(**row | {"contestants": tuple(row.get("contestants", ()))}) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a sweep: {' '.join(str(error).split())}") from error
    if len(cells) > MAX_CELLS:
        raise ValueError(f"{path} has {len(cells)} cells; the most is {MAX_CELLS}.")
    return cells
