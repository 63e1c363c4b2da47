"""The cells of a benchmark: sizes of prompts and outputs to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.parsing import read_yaml
from ..settings import BEAMS, LENGTH, OUTPUT_LENGTH, Settings, option


FIRST_ID = 10  # lower token ids are special
MAX_CELLS = 40


@dataclass(frozen=True)
class Cell(Settings):
    """One measurement: random prompts, and outputs of exactly `output` tokens."""

    prompt: int = option(64, "Length of a prompt, in tokens of the model that reads it.", **LENGTH)
    output: int = option(64, "Length of an output, in tokens.", **OUTPUT_LENGTH)
    batch: int = option(1, "Prompts per batch.", minimum=1)
    beams: int = option(1, "Beams of the beam search; 1 is greedy.", **BEAMS)
    preset: str = option("", "Name of a preset with random weights; empty for given checkpoints.")
    contestants: tuple[str, ...] = option((), "Names of contestants; empty for all that are installed.")
    repeats: int = option(5, "Rounds, in each of which every contestant generates once.", minimum=1)

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
        ValueError: If the file has no such list, the list has more than 40 cells, or a cell has an unknown field or a
            value that cannot be measured.
    """
    content = read_yaml(path)
    try:
        rows = content["cells"]
        cells = [Cell(**row | {"contestants": tuple(row.get("contestants", ()))}) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a sweep: {' '.join(str(error).split())}") from error
    if len(cells) > MAX_CELLS:
        raise ValueError(f"{path} has {len(cells)} cells; the most is {MAX_CELLS}.")
    return cells
