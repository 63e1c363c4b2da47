"""The description of a store of hidden states, and the index by which it finds prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..data.causes import unreadable_file
from ..data.records import COUNT, TEXT, Kind, read_record, whole_number, write_json
from .fingerprints import llm_fingerprint, tokenizer_fingerprint


FORMAT = 1
DESCRIPTION = "store.json"
SHARDS = "states-*.safetensors"

# The fields that must agree for two descriptions to be of the same hidden states, as messages call them.
NAMES = {
    "llm": "LLM",
    "encoder_layer": "encoder_layer",
    "decoder_layers": "decoder_layers",
    "tokenizer": "tokenizer",
    "data": "set of prompts",
    "hidden_size": "hidden size",
    "dtype": "dtype",
}
FIELDS = {
    **dict.fromkeys(("llm", "tokenizer", "data"), TEXT),
    **dict.fromkeys(("prompts", "tokens", "format"), COUNT),
    "hidden_size": whole_number(1),
    "dtype": Kind("bfloat16, float16 or float32", lambda value: value in ("bfloat16", "float16", "float32")),
}
INDEX = np.dtype([("key", "S32"), ("shard", "<i4"), ("start", "<i8"), ("length", "<i4")])


@dataclass(frozen=True)
class StoreDescription:
    """
    What a store holds.

    Args:
        llm: Fingerprint of the LLM's weights, see [`weights_fingerprint`].
        encoder_layer: Layer of the hidden states, or several layers; `None` for the last hidden state.
        tokenizer: Fingerprint of the LLM's tokenizer, see [`tokenizer_fingerprint`].
        data: Fingerprint of the set of prompts.
        prompts: Number of different prompts.
        tokens: Number of their tokens.
        hidden_size: Width of what is stored for a token, `d_llm`.
        dtype: dtype of the stored hidden states.
        format: Version of the layout.
        decoder_layers: Layers whose keys and values are stored in place of hidden states, with `fusion="cache"`.
    """

    llm: str
    encoder_layer: int | list[int] | None
    tokenizer: str
    data: str
    prompts: int
    tokens: int
    hidden_size: int
    dtype: str = "bfloat16"
    format: int = FORMAT
    decoder_layers: list[int] | None = None

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
        values = read_record(path, "Encode again: llm2slm encode --overwrite.", FIELDS)
        try:
            description = cls(**values)
        except TypeError as error:  # a field that does not exist
            raise ValueError(f"{path} cannot be read ({error}). Encode again: llm2slm encode --overwrite.") from error
        if description.format != FORMAT:
            raise ValueError(f"{folder} has format {description.format}, not {FORMAT}. Encode again with --overwrite.")
        return description

    def write(self, folder: Path) -> None:
        """Write `store.json`."""
        write_json(folder / DESCRIPTION, asdict(self))

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
        hidden_size=config.llm_hidden_size,
        dtype=dtype,
        decoder_layers=config.decoder_layers,
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
                rows = tensors.get_slice("states").get_shape()[0]
            if keys.shape != (len(lengths), 32) or lengths.sum() != rows:
                raise ValueError(f"{rows:,} hidden states do not belong to {len(keys):,} prompts")
        except (SafetensorError, OSError, ValueError) as error:
            if unreadable := unreadable_file(file):
                raise OSError(unreadable) from error
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
