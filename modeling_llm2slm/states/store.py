"""
States of the frozen LLM on disk: they never change while the rest trains, so every prompt is encoded once.

A store is a folder: `store.json` says what was encoded by what, and each `states-*.safetensors` holds the states of
some prompts one after another, `(tokens, d_llm)`, with the length of each. A prompt is found by its token ids, so rows
may be shuffled, left out or share a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..checkpoint_llm2slm import LLM_PREFIX
from ..configuration_llm2slm import llm_sizes
from ..data.files import atomic_write, remove_unfinished
from .fingerprints import tensors_of, tokenizer_fingerprint, weights_fingerprint


FORMAT = 1
SHARD_BYTES = 128 * 2**20
DESCRIPTION = "store.json"


@dataclass(frozen=True)
class StoreDescription:
    """
    What a store holds.

    Args:
        llm: Fingerprint of the LLM's weights, see [`weights_fingerprint`].
        encoder_layer: The layer the states are taken from; None: the last hidden state.
        tokenizer: Fingerprint of the LLM's tokenizer, see [`tokenizer_fingerprint`].
        data: Fingerprint of the set of prompts.
        prompts: The number of different prompts.
        tokens: Their tokens together.
        hidden_size: The width of a state, `d_llm`.
        dtype: What a state is stored in.
        format: The version of the layout.
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
        """Bytes of one state, `hidden_size` numbers."""
        return self.hidden_size * getattr(torch, self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self.tokens * self.bytes_per_token

    @classmethod
    def read(cls, folder: Path) -> StoreDescription:
        """
        Reads `store.json`.

        Raises:
            FileNotFoundError: If there is no store.
            ValueError: If it cannot be read, or was written by another version.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no store of LLM states. Make one: llm2slm encode.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            description = cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Encode anew: llm2slm encode --overwrite.") from error
        if description.format != FORMAT:
            raise ValueError(f"{folder} has format {description.format}, not {FORMAT}. Encode anew with --overwrite.")
        return description

    def check(self, other: StoreDescription, folder: Path, names: Sequence[str]) -> None:
        """Raises `ValueError` with the first of the fields `names` in which `other`, what is needed, differs."""
        for name in names:
            there, needed = getattr(self, name), getattr(other, name)
            if there != needed:
                raise ValueError(
                    f"{folder} was made with another {_SAID[name]} ({_short(there)}, not {_short(needed)}). Encode "
                    "into another folder, or anew with llm2slm encode --overwrite."
                )


_SAID = {
    "llm": "LLM",
    "encoder_layer": "encoder_layer",
    "tokenizer": "tokenizer",
    "data": "set of prompts",
    "hidden_size": "hidden size",
    "dtype": "dtype",
}


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


class StateStore:
    """
    A complete store, read through the page cache of the operating system: nothing is held in memory but an index of 48
    bytes a prompt. It may be handed to the workers of a `DataLoader`.

    Args:
        path: The folder that `llm2slm encode` wrote.

    Raises:
        FileNotFoundError: If it is no store.
        ValueError: If it is damaged or not complete.

    Example:

    ```python
    store = StateStore("runs/states")
    DataCollatorForLLM2SLM(processor, states=store)  # its batches have `llm_hidden_states`
    ```
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.description = StoreDescription.read(self.path)
        self._files = sorted(self.path.glob("states-*.safetensors"))
        self._shards: dict[int, torch.Tensor] = {}
        self._index = _read_index(self._files)
        if len(self._index) != self.description.prompts:
            raise ValueError(
                f"{path} is not complete: it has {len(self._index)} of {self.description.prompts} prompts. Run the "
                "same llm2slm encode again; it goes on where it stopped."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return StateStore, (self.path,)  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, ids: Sequence[int]) -> bool:
        return self._find(ids) is not None

    def states(self, ids: Sequence[int]) -> torch.Tensor:
        """The states `(N, d_llm)` of a prompt given by its token ids; `ValueError` if it was not encoded."""
        row = self._find(ids)
        if row is None:
            raise ValueError(
                f"A prompt of {len(ids)} tokens is not in {self.path}, which was made of other data or with another "
                "prompt_max_length. Encode all data that is trained and validated on: llm2slm encode MODEL DATA ... "
                "--output STORE."
            )
        shard, start, length = (int(row[name]) for name in ("shard", "start", "length"))
        if shard not in self._shards:
            self._shards[shard] = load_file(self._files[shard])["states"]  # mapped, not read
        return self._shards[shard][start : start + length]

    def batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`llm_hidden_states` `(B, N, d_llm)` for `input_ids` and `attention_mask` `(B, N)`; zeros on padding."""
        kept = attention_mask.bool().cpu()
        rows = [self.states(ids[mask].tolist()) for ids, mask in zip(input_ids.cpu(), kept, strict=True)]
        states = rows[0].new_zeros(*kept.shape, self.description.hidden_size)
        states[kept] = torch.cat(rows)
        return states.to(input_ids.device)

    def check(self, model: str | Path, config: Any, tokenizer: Any) -> None:
        """
        Raises `ValueError` unless the states are those of this model's LLM, and will be while it trains.

        Args:
            model: The checkpoint, a folder or a name on the Hub.
            config: Its [`LLM2SLMConfig`].
            tokenizer: The LLM's tokenizer.
        """
        if not config.freeze_llm:
            raise ValueError("An LLM that trains (`freeze_llm=False`) changes its states: train it without a store.")
        needed = describe(model, config, tokenizer, index_prompts([]), self.description.dtype)
        self.description.check(needed, self.path, ["encoder_layer", "hidden_size", "tokenizer", "llm"])

    def _find(self, ids: Sequence[int]) -> Any:
        key = prompt_key(ids)
        at = int(np.searchsorted(self._index["key"], key))
        return self._index[at] if at < len(self._index) and self._index["key"][at] == key else None


_INDEX = np.dtype([("key", "S32"), ("shard", "<i4"), ("start", "<i8"), ("length", "<i4")])


def prompt_key(ids: Sequence[int]) -> bytes:
    """What a prompt is found by: a hash of its token ids, in hexadecimal digits."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16).hexdigest().encode()


def index_prompts(prompts: Iterable[Sequence[int]]) -> np.ndarray:
    """Key and length of each prompt given by its token ids, in their order: an array of the fields `key`, `length`."""
    return np.fromiter(((prompt_key(ids), len(ids)) for ids in prompts), dtype=[("key", "S32"), ("length", "<i4")])


def _read_index(files: Sequence[Path]) -> np.ndarray:
    parts = []
    for shard, file in enumerate(files):
        try:
            with safe_open(file, framework="np") as tensors:
                keys, lengths = tensors.get_tensor("keys"), tensors.get_tensor("lengths")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Remove it and run the same llm2slm encode again, which makes it anew."
            ) from error
        part = np.zeros(len(lengths), dtype=_INDEX)
        part["key"] = keys.view("S32")[:, 0]
        part["shard"], part["length"] = shard, lengths
        part["start"] = np.cumsum(lengths) - lengths
        parts.append(part)
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=_INDEX)
    return index[np.argsort(index["key"], kind="stable")]


class StateWriter:
    """
    Writes a store shard by shard. A shard appears when it is complete; what a killed run wrote is kept and known.

    Args:
        path: The folder of the store. One that exists is continued.
        description: What the store will hold.
        shard_bytes: A shard is closed when its states take this many bytes.
        writer: The number of this process, where several write one store.

    Attributes:
        done: The keys of all prompts that were in the store at the start.

    Raises:
        ValueError: If the folder holds a store of something else.
    """

    def __init__(
        self, path: str | Path, description: StoreDescription, shard_bytes: int = SHARD_BYTES, writer: int = 0
    ):
        self.path = Path(path)
        self.description = description
        self.shard_bytes = shard_bytes
        self._prefix = f"states-{writer:04d}-"
        self._start(writer)
        self._files = len(list(self.path.glob(f"{self._prefix}*.safetensors")))
        index = _read_index(sorted(self.path.glob("states-*.safetensors")))
        self.done = index["key"]
        self._keys: list[bytes] = []
        self._states: list[torch.Tensor] = []
        self._kept_bytes = 0

    def _start(self, writer: int) -> None:
        if (self.path / DESCRIPTION).exists():
            names = [field.name for field in fields(StoreDescription) if field.name in _SAID]
            StoreDescription.read(self.path).check(self.description, self.path, names)
        elif writer == 0:
            if any(self.path.glob(f"{self._prefix}*.safetensors")):
                raise ValueError(
                    f"{self.path} holds states, but no {DESCRIPTION} that says of what. Remove them, with --overwrite."
                )
            with atomic_write(self.path / DESCRIPTION) as temporary:
                temporary.write_text(json.dumps(asdict(self.description), indent=2) + "\n", encoding="utf-8")
        remove_unfinished(self.path / f"{self._prefix}*.safetensors")

    def add(self, ids: Sequence[int], states: torch.Tensor) -> None:
        """Keeps the states `(N, d_llm)` of a prompt, and writes a shard when there are enough."""
        kept = states.to("cpu", getattr(torch, self.description.dtype))
        if self.description.dtype == "float16" and not kept.isfinite().all():
            raise ValueError("The LLM's states overflow in float16. Store them in bfloat16 (--dtype bfloat16).")
        self._keys.append(prompt_key(ids))
        self._states.append(kept)
        self._kept_bytes += self._states[-1].nbytes
        if self._kept_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept, if anything is."""
        if not self._keys:
            return
        keys = np.array(self._keys, dtype="S32").view(np.uint8).reshape(-1, 32)
        tensors = {
            "states": torch.cat(self._states),
            "keys": torch.from_numpy(keys),
            "lengths": torch.tensor([len(states) for states in self._states], dtype=torch.int64),
        }
        while (target := self.path / f"{self._prefix}{self._files:06d}.safetensors").exists():
            self._files += 1  # a damaged shard that was removed has left its number free
        with atomic_write(target) as temporary:
            save_file(tensors, temporary)
        self._keys, self._states, self._kept_bytes = [], [], 0


def remove_store(path: str | Path) -> None:
    """Removes the files of a store, and nothing else that may lie in its folder."""
    # The description goes last: states without one would be taken for those of the next that is written.
    for file in (*Path(path).glob("states-*.safetensors"), Path(path) / DESCRIPTION):
        file.unlink(missing_ok=True)


def describe(model: str | Path, config: Any, tokenizer: Any, index: np.ndarray, dtype: str) -> StoreDescription:
    """
    The description of a store.

    Args:
        model: The checkpoint whose LLM makes the states, a folder or a name on the Hub.
        config: Its [`LLM2SLMConfig`].
        tokenizer: The LLM's tokenizer.
        index: What [`index_prompts`] says of all prompts; of equal ones, one counts.
        dtype: What states are stored in.
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


def llm_fingerprint(model: str | Path) -> str:
    """[`weights_fingerprint`] of a composite's LLM; `ValueError` if the checkpoint holds none."""
    if not tensors_of(model, LLM_PREFIX):
        raise ValueError(f"{model} holds no LLM. If it is a lean checkpoint, make it full: llm2slm convert full.")
    return weights_fingerprint(model, LLM_PREFIX)


def is_complete(folder: str | Path) -> bool:
    """Whether a folder is a store that has all its states; one that is being written, or was left half-way, is not."""
    try:
        StateStore(folder)
    except (OSError, ValueError):
        return False
    return True
