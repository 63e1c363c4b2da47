# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights in safetensors files, in a folder or on the Hub, and their fingerprints."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLES = 128  # values of each tensor that a fingerprint reads, at each of two places


def weight_files(source: str | Path, on_hub: bool, subfolder: str = "", **hub: Any) -> list[Path]:
    """
    Return the safetensors files of a checkpoint: a folder, or a repository (`on_hub`), which is never mistaken for a
    folder of its name. Files are downloaded if needed, with the arguments `hub` of `hf_hub_download`.

    Raises:
        OSError: If there are none, or they cannot be reached; pickled weights are never read.
        ValueError: If the index names a file outside the folder.
    """

    def fetch(name: str) -> Path | None:
        if not on_hub:
            return file if (file := Path(source, subfolder, name)).is_file() else None
        try:
            return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **hub))
        except EntryNotFoundError:  # also: not in the cache, and no network
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise OSError(f"{source} cannot be fetched from the Hub: {first_line(error)}") from error

    if (whole := fetch(WEIGHTS)) is not None:
        return [whole]
    if (index := fetch(INDEX)) is None:
        where = "on the Hub, nor in the cache where the Hub is out of reach" if on_hub else "in this folder"
        raise OSError(f"{source} has no {WEIGHTS} and no index of shards {where}; pickled weights are not read.")
    files = []
    for name in shard_names(index):
        if (file := fetch(name)) is None:
            raise OSError(f"{source} is incomplete: its shard {name} is missing.")
        files.append(file)
    return files


def shard_names(index: Path) -> list[str]:
    """Return the files that an index of shards names. Raise `ValueError` for one outside its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{index.name} in {index.parent} is damaged: it is not an index of shards.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"A checkpoint names {name!r} as its weights, but only safetensors files in its folder are read."
            )
    return names


def open_weights(files: Iterable[str | Path]) -> dict[str, Any]:
    """
    Open safetensors files. Return their tensors by name, as slices: `tensor[...]` reads one, `tensor[:2]` two rows.

    Raises:
        OSError: If a file is missing or damaged.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            open(file, "rb").close()  # an error of the system has its own words
            handle = safe_open(str(file), framework="pt")
            names = handle.keys()
            tensors.update({name: handle.get_slice(name) for name in names})
        except SafetensorError as error:
            raise OSError(f"{Path(file).name} is damaged or incomplete: {first_line(error)}") from error
    return tensors


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, or of a slice from [`open_weights`]."""
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """
    Return a fingerprint of tensors, or slices from [`open_weights`], by their names in the model. It covers names,
    shapes and 256 values of each tensor, rounded to bfloat16, so it does not depend on the sharding and is the same in
    float32 and bfloat16 (float16 rounds twice). Weights trained further have another one; it may miss a change of
    single values.
    """
    digest, samples = hashlib.sha256(b"llm2slm-fingerprint-1"), []
    for name in sorted(tensors):
        shape = shape_of(tensors[name])
        digest.update(f"{name}{shape}".encode())
        for start in (math.prod(shape) // 3, math.prod(shape) * 2 // 3) if 0 not in shape else ():
            samples.append(_sample(tensors[name], shape, start))
    # Cast in pieces small enough for one thread: waking others on a busy machine takes longer than the casts.
    for piece in torch.cat(samples).split(2**14) if samples else ():
        digest.update(piece.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(tensor: Any, shape: tuple[int, ...], start: int) -> torch.Tensor:
    """Return up to `SAMPLES` values from `start` on, as if the tensor were flat; read only the rows that hold them."""
    if not shape:
        return tensor[...].detach().reshape(-1)
    first = start // (width := math.prod(shape[1:]))
    rows = tensor[first : (start + SAMPLES - 1) // width + 1].detach().reshape(-1)
    return rows[start - first * width :][:SAMPLES]


def first_line(error: BaseException) -> str:
    """Return what went wrong, without the explanations that follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
