"""Encode prompts once: compute the LLM's hidden states of a data set and write them to a store for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig

from ..configuration_llm2slm import LLM2SLMConfig
from ..data import resources
from ..data.bad_rows import good_rows
from ..data.cluster import connected, path_for_workers
from ..data.conversations import encode_prompts
from ..data.loading import ROW, load_prompts
from ..data.output_paths import claimed
from ..data.processes import processes, share
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..processing_llm2slm import LLM2SLMProcessor
from ..settings import EncodeSettings, RaySettings
from .description import DESCRIPTION, SHARDS, StoreDescription, describe, index_prompts, read_index
from .loading import load, load_model, to_device
from .store import remove_store
from .writer import StateWriter, as_stored


Progress = Callable[[int, int], None]


def encode(
    model: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    settings: EncodeSettings = EncodeSettings(),  # noqa: B008 - immutable
    *,
    ray: RaySettings = RaySettings(),  # noqa: B008 - immutable
    announce: Callable[[StoreDescription, int], None] = lambda description, bytes_to_write: None,
    progress: Progress = lambda done, total: None,
) -> StoreDescription:
    """
    Run the LLM of an LLM-to-SLM model over every prompt, and write its hidden states to a store.

    A run that was killed resumes where it stopped. If the environment sets `RANK` and `WORLD_SIZE` (`torchrun`), each
    process encodes its share of the prompts into the same store. On a Ray cluster, workers encode, and this process
    writes the store.

    Args:
        model: The LLM-to-SLM checkpoint, a folder or a name on the Hub.
        data: Files or data sets on the Hub, see [`load_prompts`]: all training and validation data.
        output: Folder of the store.
        settings: How prompts are read and encoded. `limit` applies to each source of `data`.
        ray: A Ray cluster that encodes.
        announce: Called before anything is computed, with the description and the number of bytes still to write.
        progress: Called with the number of prompts that are done and of all prompts.

    Returns:
        The description of the store.

    Raises:
        FileExistsError: If `output` holds other files than a store, unless `settings.overwrite` is set.
        ValueError: If `output` is a store of something else, the model is not an LLM-to-SLM model, or a prompt is too
            long for the LLM.
        OSError: If the model cannot be loaded, the disk is too small, or another run writes to the store.
    """
    rank, world = processes(settings.overwrite)
    keeps = settings.overwrite or Path(output, DESCRIPTION).is_file() or any(Path(output).glob(SHARDS))
    with ExitStack() as stack:
        stack.enter_context(claimed(output, folder=True, overwrite=keeps, inputs=(model,), rank=rank))
        workers = stack.enter_context(connected(ray, settings.device))
        encoder = _Encoder(model, settings)
        if workers is None:
            encoder.load()  # fails before anything is written
        prompts, index = encoder.read(data)
        description = describe(model, encoder.config, encoder.processor.tokenizer, index, settings.dtype)
        if settings.overwrite and not _is_unfinished(output, description):
            remove_store(output)
        check_disk_space(output, description)
        writer = StateWriter(output, description, settings.shard_bytes, rank)
        rows = _shortest_first(index)
        missing = rows[~np.isin(index["key"][rows], writer.done)]
        announce(description, int(index["length"][missing].sum()) * description.bytes_per_token)
        done = len(rows) - len(missing)
        progress(done, len(rows))
        # Shares are cut from all rows and not from the missing ones, as another process may have written some already.
        own = share(rows, settings.batch_size, rank, world)
        own = own[np.isin(own, missing)]
        starts = range(0, len(own), settings.batch_size)
        batches = (prompts[own[start : start + settings.batch_size]]["prompt"] for start in starts)
        encoded: Iterable[list[tuple[list[int], torch.Tensor]]]
        if workers is None:
            encoded = map(encoder, batches)
        else:
            arguments = {"model": path_for_workers(model), "settings": settings}
            encoded = (states for _, states in workers.map(_Encoder, arguments, batches))
        for batch in encoded:
            for ids, states in batch:
                writer.add(ids, states)
            done = min(done + world * len(batch), len(rows))
            progress(done, len(rows))
        writer.flush()
        return description


class _Encoder:
    """
    The LLM of an LLM-to-SLM model, with its tokenizer. It is loaded for the first batch: where workers of a cluster
    encode, the process that sends them prompts may not hold it.
    """

    def __init__(self, model: str | Path, settings: EncodeSettings):
        self.settings = settings
        self._path = model
        self.config = _load_config(model)
        self.processor = load(LLM2SLMProcessor, model)
        if settings.prompt_max_length is not None:
            self.processor.prompt_max_length = settings.prompt_max_length

    def __call__(self, prompts: Sequence[str]) -> list[tuple[list[int], torch.Tensor]]:
        """Return the token ids and the hidden states `(N, d_llm)`, as they are stored, of each prompt of a batch."""
        ids = self.token_ids(prompts)
        encoded = zip(ids, self.encode(ids), strict=True)
        return [(prompt, as_stored(prompt, states, self.settings.dtype)) for prompt, states in encoded]

    def load(self) -> None:
        """Load the model now."""
        assert self.model is not None

    @cached_property
    def model(self) -> Any:
        """The model."""
        return to_device(_load_model(self._path, self.config), self.settings.device)

    def read(self, data: Sequence[str | Path]) -> tuple[Dataset, np.ndarray]:
        """Return the prompts of all sources that fit the LLM, and [`index_prompts`] of them."""
        parts, indices = [], []
        for source in data:
            prompts = load_prompts(source, self.settings, number_rows=True)
            index = index_prompts(self._all_token_ids(prompts))
            fitting = good_rows(
                str(source), prompts[ROW][:], self._problems(index["length"]), self.settings.skip_bad_rows
            )
            parts.append(prompts.select(fitting))
            indices.append(index[fitting])
        return concatenate_datasets(parts), np.concatenate(indices)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompts, truncated to `prompt_max_length`."""
        return encode_prompts(self.processor, prompts, lambda given: self.processor(text=given)["input_ids"])

    def _all_token_ids(self, prompts: Dataset) -> Iterator[list[int]]:
        for rows in prompts.iter(batch_size=1000):
            yield from self.token_ids(rows["prompt"])

    def _problems(self, lengths: np.ndarray) -> dict[int, str]:
        """Return the problem of each prompt that is too long for the LLM, by index."""
        positions = self.config.llm_positions
        return {
            int(index): f"has a prompt of {lengths[index]} tokens, but the LLM has {positions} positions "
            "(prompt_max_length truncates)"
            for index in np.flatnonzero(lengths > (positions or np.inf))
        }

    def encode(self, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
        """Return the hidden states `(N, d_llm)` of each prompt of a batch."""
        features = {"input_ids": list(prompts), "attention_mask": [[1] * len(ids) for ids in prompts]}
        batch = self.processor.tokenizer.pad(features, return_tensors="pt", verbose=False).to(self.model.device)
        states = self.model.encode_llm(batch["input_ids"], batch["attention_mask"])
        return [row[mask.bool()] for row, mask in zip(states, batch["attention_mask"], strict=True)]


def _is_unfinished(folder: str | Path, description: StoreDescription) -> bool:
    """Return whether an interrupted run has begun the store that is described."""
    try:
        StoreDescription.read(Path(folder)).check(description, Path(folder))
        return len(read_index(sorted(Path(folder).glob(SHARDS)))) < description.prompts
    except (OSError, ValueError):
        return False


def _load_config(path: str | Path) -> LLM2SLMConfig:
    config = load(AutoConfig, path)
    if not isinstance(config, LLM2SLMConfig):
        raise ValueError(f"{path} is not an LLM-to-SLM model, so it has no LLM to encode with: see llm2slm build.")
    if config.lean:
        raise ValueError(
            f"encode needs a full checkpoint, and {path} is lean: run llm2slm convert full {path} FOLDER."
        )
    return config


def _load_model(path: str | Path, config: LLM2SLMConfig) -> Any:
    """Load an LLM-to-SLM checkpoint; the LLM keeps the dtype that it was saved in."""
    dtype = str(config.encoder_dtype or config.dtype or "float32").removeprefix("torch.")
    model = load_model(
        LLM2SLMForConditionalGeneration,
        path,
        dtype=torch.float32,
        encoder_dtype=dtype if config.freeze_llm else "float32",
    )
    return model.eval()


def _shortest_first(index: np.ndarray) -> np.ndarray:
    """Return the first row of each different prompt, the shortest prompts first."""
    _, first = np.unique(index["key"], return_index=True)
    return first[np.lexsort((first, index["length"][first]))]


def check_disk_space(folder: str | Path, description: StoreDescription) -> None:
    """Raise `OSError` if the hidden states that the folder does not hold yet do not fit on its disk."""
    folder = Path(folder)
    stored = sum(file.stat().st_size for file in folder.glob(SHARDS))
    purpose = f" for {description.tokens:,} tokens"
    fix = "Free disk space, choose another disk, or encode fewer prompts (--limit)."
    resources.check_disk_space(folder, description.nbytes - stored, purpose, fix)
