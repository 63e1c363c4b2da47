"""Encoding prompts once: the LLM's states of a data set, written to a store that training reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from ..data.loading import ROW, check_any_left, load_prompts, report_bad_rows
from ..data.processes import processes, share
from ..inference.text_to_text import TextToText
from .store import SHARD_BYTES, StateWriter, StoreDescription, describe, index_prompts, remove_store


Progress = Callable[[int, int], None]


def encode(
    model: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    prompt_column: str = "prompt",
    *,
    split: str = "train",
    limit: int | None = None,
    prompt_max_length: int | None = None,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    announce: Callable[[StoreDescription, int], None] = lambda description, bytes_to_write: None,
    progress: Progress = lambda done, total: None,
) -> StoreDescription:
    """
    Runs the LLM of a composite over every prompt of some data, and writes its states to a store.

    A run that was killed goes on where it was. Where the environment has `RANK` and `WORLD_SIZE` (`torchrun`), each
    process encodes its part of the prompts into the same store.

    Args:
        model: The checkpoint of the composite, a folder or a name on the Hub.
        data: Files or data sets on the Hub, see [`load_prompts`]: all that is trained and validated on.
        output: The folder of the store.
        prompt_column: The column that holds what the model reads.
        split: The split to take from data sets on the Hub.
        limit: Encode only this many prompts of each, from the top.
        prompt_max_length: Prompts are cut to this many tokens, as in training (default: the processor's limit).
        dtype: What states are stored in: `"bfloat16"`, `"float16"` or `"float32"`.
        batch_size: How many prompts go through the LLM at once, those of similar length together.
        device: Where to run the LLM.
        shard_bytes: The size of a file, and how much a kill may lose.
        skip_bad_rows: Leave out rows that hold no text or are too long for the LLM, with a warning.
        overwrite: Remove a store that is there first.
        announce: Called before anything is computed, with what the store will hold and the bytes still to write.
        progress: Called with the numbers of prompts done and in all.

    Returns:
        What the store holds.

    Raises:
        ValueError: If `output` is a store of something else, the model has no LLM, or a prompt no room in it.
        OSError: If the disk has not enough room.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}, but states are stored in bfloat16, float16 or float32.")
    text_to_text = TextToText.from_pretrained(
        model, device=device, prompt_max_length=prompt_max_length, keep_llm_dtype=True
    )
    if not hasattr(text_to_text.model, "encode_llm"):
        raise ValueError(f"{model} is no LLM-to-SLM model, so it has no LLM to encode with. Make one: llm2slm build.")
    config, tokenizer = text_to_text.model.config, text_to_text.processor.tokenizer
    parts, indices = [], []
    for source in data:
        prompts = load_prompts(
            source, prompt_column, split=split, limit=limit, skip_bad_rows=skip_bad_rows, number_rows=True
        )
        index = index_prompts(_token_ids(text_to_text, prompts))
        fitting = index["length"] <= (config.llm_positions or np.inf)
        if not fitting.all():
            _tell_long(str(source), prompts, index["length"], ~fitting, config.llm_positions, skip_bad_rows)
            prompts, index = prompts.select(np.flatnonzero(fitting)), index[fitting]
        parts.append(prompts)
        indices.append(index)
    prompts, index = concatenate_datasets(parts), np.concatenate(indices)
    description = describe(model, config, tokenizer, index, dtype)
    rank, world = processes(overwrite)
    if overwrite:
        remove_store(output)
    check_disk_space(output, description)
    writer = StateWriter(output, description, shard_bytes, writer=rank)
    rows = _shortest_first(index)
    missing = rows[~np.isin(index["key"][rows], writer.done)]
    announce(description, int(index["length"][missing].sum()) * description.bytes_per_token)
    done = len(rows) - len(missing)
    progress(done, len(rows))
    # Shares are cut from all rows, not from what is missing: another process may have begun.
    todo = share(rows, batch_size, rank, world)
    todo = todo[np.isin(todo, missing)]
    for start in range(0, len(todo), batch_size):
        ids = text_to_text.features(prompts[todo[start : start + batch_size]]["prompt"])["input_ids"]
        for prompt, states in zip(ids, _encode_batch(text_to_text, ids), strict=True):
            writer.add(prompt, states)
        done = min(done + world * len(ids), len(rows))
        progress(done, len(rows))
    writer.flush()
    return description


def _tell_long(
    source: str, prompts: Dataset, lengths: np.ndarray, too_long: np.ndarray, positions: int | None, skip: bool
) -> None:
    """Tells which rows of a source the LLM has no positions for, see [`report_bad_rows`]; that all are is an error."""
    rows = prompts[ROW][:]
    bad = {
        rows[place]: f"row {rows[place]} has a prompt of {lengths[place]} tokens, but the LLM has {positions} "
        "positions (prompt_max_length cuts)"
        for place in np.flatnonzero(too_long)
    }
    check_any_left(source, bad, len(rows))
    report_bad_rows(source, bad, skip)


def _token_ids(text_to_text: TextToText, prompts: Dataset) -> Iterator[list[int]]:
    for rows in prompts.iter(batch_size=1000):
        yield from text_to_text.features(rows["prompt"])["input_ids"]


def _shortest_first(index: np.ndarray) -> np.ndarray:
    """The first row of each prompt, the shortest prompts first."""
    _, first = np.unique(index["key"], return_index=True)
    return first[np.lexsort((first, index["length"][first]))]


def check_disk_space(folder: str | Path, description: StoreDescription) -> None:
    """Raises `OSError` if the states, less what the folder holds already, do not fit on its disk."""
    folder = Path(folder)
    there = sum(file.stat().st_size for file in folder.glob("states-*.safetensors"))
    needed = description.nbytes - there
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB for {description.tokens:,} tokens, but its disk has "
            f"{free / 1e9:.2f} GB free. Make room, choose another disk, or encode fewer prompts (--limit)."
        )


def _encode_batch(text_to_text: TextToText, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The states `(N, d_llm)` of each prompt."""
    pad, model = text_to_text.processor.tokenizer.pad, text_to_text.model
    features = {"input_ids": list(prompts), "attention_mask": [[1] * len(ids) for ids in prompts]}
    batch = pad(features, return_tensors="pt", verbose=False).to(model.device)
    states = model.encode_llm(batch["input_ids"], batch["attention_mask"])
    return [row[mask.bool()] for row, mask in zip(states, batch["attention_mask"], strict=True)]
