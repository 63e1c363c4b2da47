"""The share of the work that each of several processes does, where `torchrun` has started them."""

from __future__ import annotations

import os

import numpy as np


def processes(overwrite: bool) -> tuple[int, int]:
    """
    The number of this process and of all, where `torchrun` has started several; they cannot overwrite what others of
    them may just have written, which is a `ValueError`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if overwrite and world > 1:
        raise ValueError("Several processes cannot overwrite: remove the output before you start them.")
    return rank, world


def share(rows: np.ndarray, batch_size: int, rank: int, world: int) -> np.ndarray:
    """The rows of one of several processes: every `world`-th batch."""
    return rows[np.arange(len(rows)) // batch_size % world == rank]
