"""How several processes that `torchrun` started share the work."""

from __future__ import annotations

import os

import numpy as np


def processes(overwrite: bool) -> tuple[int, int]:
    """
    Return the rank of this process and the number of processes.

    Raises:
        ValueError: If several processes are to overwrite an output: one might remove what another has just written.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if overwrite and world > 1:
        raise ValueError("Several processes cannot overwrite an output: remove it before you start them.")
    return rank, world


def share(rows: np.ndarray, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Return the rows of one process: every `world`-th batch."""
    return rows[np.arange(len(rows)) // batch_size % world == rank]
