"""
Hidden states of the frozen LLM on disk. They never change while the rest trains, so each prompt is encoded once.

A store is a folder. Its `store.json` describes the LLM, the tokenizer and the prompts; each `states-*.safetensors`
holds the hidden states of some prompts, `(tokens, d_llm)`, with the keys and lengths of the prompts. A prompt is found
by its token ids, so examples may be shuffled, left out, or share a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from .description import DESCRIPTION, SHARDS, StoreDescription, describe, index_prompts, prompt_key, read_index


class StateStore:
    """
    Reads a complete store through the page cache of the operating system: only an index of 48 bytes per prompt is held
    in memory. Workers of a `DataLoader` can use it.

    Args:
        path: The folder that `llm2slm encode` wrote.

    Raises:
        FileNotFoundError: If the folder is not a store.
        ValueError: If the store is damaged or incomplete.

    Example:

    ```python
    store = StateStore("runs/states")
    model = load_without_llm("runs/start")
    collator = DataCollatorForLLM2SLM(processor, states=store)  # its batches contain `llm_hidden_states`
    ```
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.description = StoreDescription.read(self.path)
        self._files = sorted(self.path.glob(SHARDS))
        self._shards: dict[int, torch.Tensor] = {}
        self._index = read_index(self._files)
        if len(self._index) != self.description.prompts:
            raise ValueError(
                f"{path} is not complete: it has {len(self._index)} of {self.description.prompts} prompts. Run the "
                "same llm2slm encode again; it resumes where it stopped."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return StateStore, (self.path,)  # each worker maps the files itself

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, ids: Sequence[int]) -> bool:
        return self._find(ids) is not None

    def hidden_states(self, ids: Sequence[int]) -> torch.Tensor:
        """
        Return the hidden states `(N, d_llm)` of a prompt.

        Args:
            ids: The prompt's token ids.

        Raises:
            ValueError: If the prompt was not encoded.
        """
        entry = self._find(ids)
        if entry is None:
            raise ValueError(
                f"A prompt of {len(ids)} tokens is not in {self.path}, which was made from other data or with another "
                "prompt_max_length. Encode all training and validation data: llm2slm encode MODEL DATA ... "
                "--output STORE."
            )
        shard, start, length = (int(entry[name]) for name in ("shard", "start", "length"))
        if shard not in self._shards:
            self._shards[shard] = load_file(self._files[shard])["states"]  # mapped, not read
        return self._shards[shard][start : start + length]

    def batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return `llm_hidden_states` `(B, N, d_llm)` for prompts `(B, N)` with their mask; zeros on padding."""
        kept = attention_mask.bool().cpu()
        rows = [self.hidden_states(ids[mask].tolist()) for ids, mask in zip(input_ids.cpu(), kept, strict=True)]
        states = rows[0].new_zeros(*kept.shape, self.description.hidden_size)
        states[kept] = torch.cat(rows)
        return states.to(input_ids.device)

    def check(self, model: str | Path, config: Any, tokenizer: Any) -> None:
        """
        Check that a model's LLM computes these hidden states, and that training does not change them.

        Args:
            model: The checkpoint, a folder or a name on the Hub.
            config: Its [`LLM2SLMConfig`].
            tokenizer: The LLM's tokenizer.

        Raises:
            ValueError: If the store belongs to another LLM, layer or tokenizer, or the LLM trains.
        """
        if not config.freeze_llm:
            raise ValueError(
                "An LLM that trains (`freeze_llm=False`) changes its hidden states: train it without a store."
            )
        needed = describe(model, config, tokenizer, index_prompts([]), self.description.dtype)
        self.description.check(
            needed, self.path, ["encoder_layer", "decoder_layers", "hidden_size", "tokenizer", "llm"]
        )

    def _find(self, ids: Sequence[int]) -> Any:
        key = prompt_key(ids)
        position = int(np.searchsorted(self._index["key"], key))
        found = position < len(self._index) and self._index["key"][position] == key
        return self._index[position] if found else None


def is_complete(folder: str | Path) -> bool:
    """Return whether a folder is a store with all its hidden states, not one that is still being written."""
    try:
        StateStore(folder)
    except (OSError, ValueError):
        return False
    return True


def remove_store(path: str | Path) -> None:
    """Remove the files of a store, and no other files in its folder."""
    # The description goes last: shards without one would be taken for those of the next store in this folder.
    for file in (*Path(path).glob(SHARDS), Path(path) / DESCRIPTION):
        file.unlink(missing_ok=True)
