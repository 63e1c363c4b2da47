"""The description of a store of hidden states, and the index by which it finds prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..configuration_llm2slm import llm_sizes
from ..data.atomic import atomic_write
from ..data.parsing import read_json
from .fingerprints import llm_fingerprint, tokenizer_fingerprint


FORMAT = 1
DESCRIPTION = "store.json"
SHARDS = "states-*.safetensors"

# The fields that must agree for two descriptions to be of the same hidden states, as messages call them.
NAMES = {
    "llm": "LLM",
    "encoder_layer": "encoder_layer",
    "tokenizer": "tokenizer",
    "data": "set of prompts",
    "hidden_size": "hidden size",
    "dtype": "dtype",
}
INDEX = np.dtype([("key", "S32"), ("shard", "<i4"), ("start", "<i8"), ("length", "<i4")])


@dataclass(frozen=True)
class StoreDescription:
    """
    What a store holds.

    Args:
        llm: Fingerprint of the LLM's weights, see [`weights_fingerprint`].
        encoder_layer: Layer of the hidden states; `None` for the last hidden state.
        tokenizer: Fingerprint of the LLM's tokenizer, see [`tokenizer_fingerprint`].
        data: Fingerprint of the set of prompts.
        prompts: Number of different prompts.
        tokens: Number of their tokens.
        hidden_size: Width of a hidden state, `d_llm`.
        dtype: dtype of the stored hidden states.
        format: Version of the layout.
    """

    llm: str
    encoder_layer: int | None
    tokenizer: str
    data: str
    prompts: int
    tokens: int
    hidden_size: int
    dtype: str = "bfloat16"
    format: int = FORMAT

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one hidden state."""
        return self.hidden_size * getattr(torch, self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        return self.tokens * self.bytes_per_token

    @classmethod
    def read(cls, folder: Path) -> StoreDescription:
        """
        Read `store.json`.

        Raises:
            FileNotFoundError: If the folder is not a store.
            ValueError: If the file cannot be read, or was written by another version.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a store of hidden states. Create one: llm2slm encode.")
        try:
            values = read_json(path)
            description = cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Encode again: llm2slm encode --overwrite.") from error
        if description.format != FORMAT:
            raise ValueError(f"{folder} has format {description.format}, not {FORMAT}. Encode again with --overwrite.")
        return description

    def write(self, folder: Path) -> None:
        """Write `store.json`."""
        with atomic_write(folder / DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, needed: StoreDescription, folder: Path, names: Sequence[str] = tuple(NAMES)) -> None:
        """Raise `ValueError` with the first of the fields `names` whose value is not the one that is needed."""
        for name in names:
            stored, wanted = getattr(self, name), getattr(needed, name)
            if stored != wanted:
                raise ValueError(
                    f"{folder} was made with another {NAMES[name]} ({_shorten(stored)}, not {_shorten(wanted)}). "
                    "Encode into another folder, or replace the store with llm2slm encode --overwrite."
                )


def _shorten(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


def describe(model: str | Path, config: Any, tokenizer: Any, index: np.ndarray, dtype: str) -> StoreDescription:
    """
    Describe the store of some prompts.

    Args:
        model: The checkpoint whose LLM computes the hidden states: a folder or a name on the Hub.
        config: Its [`LLM2SLMConfig`].
        tokenizer: The LLM's tokenizer.
        index: [`index_prompts`] of all prompts; equal prompts count once.
        dtype: dtype of the stored hidden states.
    """
    keys, first = np.unique(index["key"], return_index=True)
    return StoreDescription(
        llm=llm_fingerprint(model),
        encoder_layer=config.encoder_layer,
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=hashlib.sha256(keys.tobytes()).hexdigest(),
        prompts=len(keys),
        tokens=int(index["length"][first].sum()),
        hidden_size=llm_sizes(config.encoder).hidden_size,
        dtype=dtype,
    )


def prompt_key(ids: Sequence[int]) -> bytes:
    """Return the key of a prompt: a hash of its token ids, in hexadecimal digits."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16).hexdigest().encode()


def index_prompts(prompts: Iterable[Sequence[int]]) -> np.ndarray:
    """Return an array with the fields `key` and `length` for prompts that are given by their token ids."""
    return np.fromiter(((prompt_key(ids), len(ids)) for ids in prompts), dtype=[("key", "S32"), ("length", "<i4")])


def read_index(files: Sequence[Path]) -> np.ndarray:
    """Return where each prompt is stored in the shards, sorted by key: the fields of `INDEX`."""
    parts = []
    for shard, file in enumerate(files):
        try:
            with safe_open(file, framework="np") as tensors:
                keys, lengths = tensors.get_tensor("keys"), tensors.get_tensor("lengths")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Remove it and run the same llm2slm encode again: it encodes what is "
                "missing."
            ) from error
        part = np.zeros(len(lengths), dtype=INDEX)
        part["key"] = keys.view("S32")[:, 0]
        part["shard"], part["length"] = shard, lengths
        part["start"] = np.cumsum(lengths) - lengths
        parts.append(part)
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=INDEX)
    return index[np.argsort(index["key"], kind="stable")]
