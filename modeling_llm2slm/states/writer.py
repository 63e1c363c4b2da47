"""Write a store of hidden states, so that a killed run can be resumed and several processes can share the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..data.atomic import atomic_write, remove_unfinished
from ..settings import EncodeSettings
from .description import DESCRIPTION, SHARDS, StoreDescription, prompt_key, read_index


class StateWriter:
    """
    Writes a store shard by shard, each with an atomic write. Shards of a run that was killed are kept.

    Args:
        path: Folder of the store. An existing store is continued.
        description: What the store will hold.
        shard_bytes: Size of the hidden states in a shard, in bytes.
        rank: Rank of this process, if several write to the same store.

    Attributes:
        done: Keys of all prompts that were in the store at the start.

    Raises:
        ValueError: If the folder holds a store of something else.
    """

    def __init__(
        self,
        path: str | Path,
        description: StoreDescription,
        shard_bytes: int = EncodeSettings().shard_bytes,  # noqa: B008 - a number
        rank: int = 0,
    ):
        self.path = Path(path)
        self.description = description
        self.shard_bytes = shard_bytes
        self._prefix = f"states-{rank:04d}-"
        self._start(rank)
        self._files = len(list(self.path.glob(f"{self._prefix}*.safetensors")))
        self.done = read_index(sorted(self.path.glob(SHARDS)))["key"]
        self._keys: list[bytes] = []
        self._states: list[torch.Tensor] = []
        self._buffered_bytes = 0

    def _start(self, rank: int) -> None:
        if (self.path / DESCRIPTION).exists():
            StoreDescription.read(self.path).check(self.description, self.path)
        elif rank == 0:
            if any(self.path.glob(f"{self._prefix}*.safetensors")):
                raise ValueError(
                    f"{self.path} holds hidden states, but no {DESCRIPTION} that describes them. Remove them with "
                    "--overwrite."
                )
            self.description.write(self.path)
        remove_unfinished(self.path / f"{self._prefix}*.safetensors")

    def add(self, ids: Sequence[int], states: torch.Tensor) -> None:
        """
        Add the hidden states `(N, d_llm)` of a prompt, and write a shard once it is full.

        Raises:
            ValueError: If they are not finite, or overflow in float16.
        """
        stored = as_stored(ids, states, self.description.dtype)
        self._keys.append(prompt_key(ids))
        self._states.append(stored)
        self._buffered_bytes += stored.nbytes
        if self._buffered_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard, if anything was."""
        if not self._keys:
            return
        keys = np.array(self._keys, dtype="S32").view(np.uint8).reshape(-1, 32)
        tensors = {
            "states": torch.cat(self._states),
            "keys": torch.from_numpy(keys),
            "lengths": torch.tensor([len(states) for states in self._states], dtype=torch.int64),
        }
        while (target := self.path / f"{self._prefix}{self._files:06d}.safetensors").exists():
            self._files += 1  # a damaged shard that was removed leaves its number free
        with atomic_write(target) as temporary:
            save_file(tensors, temporary)
        self._keys, self._states, self._buffered_bytes = [], [], 0


def as_stored(ids: Sequence[int], states: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the hidden states of a prompt as a store has them, or raise `ValueError`, see [`StateWriter.add`]."""
    stored = states.to("cpu", getattr(torch, dtype))
    if not stored.isfinite().all():
        if dtype == "float16" and states.isfinite().all():
            raise ValueError("The LLM's hidden states overflow in float16. Store them in bfloat16 (--dtype bfloat16).")
        raise ValueError(
            f"The LLM's hidden states of a prompt of {len(ids)} tokens are not finite in {states.dtype}. Build "
            "the model with another encoder_dtype, such as bfloat16 or float32."
        )
    return stored
