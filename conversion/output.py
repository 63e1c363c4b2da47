"""Where a conversion writes: in place whole or not at all, and never over what is there unless told to."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor
from transformers.utils.logging import tqdm

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMProcessor
from modeling_llm2slm.data.files import atomic_write
from modeling_llm2slm.files_llm2slm import INDEX, WEIGHTS, first_line
from modeling_llm2slm.inference.saving import check_not_replaced
from modeling_llm2slm.inference.text_to_text import load

from .report import Report


@contextmanager
def output_folder(
    path: str | Path, force: bool, needed: int = 0, named: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """
    A folder to write to that becomes `path` at the end.

    Args:
        path: Where the result goes.
        force: Whether a folder that is there and not empty is replaced.
        needed: The size of the result in bytes, which must be free on the disk.
        named: The source of an LLM that the result names, and so must not replace.

    Raises:
        FileExistsError: If there is something at `path`.
        OSError: If the disk is too full, before or while it is written.
        ValueError: If the LLM is in `path`.
    """
    path = Path(path)
    check_not_replaced(named, path, emptied=True)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not force:
        raise FileExistsError(f"{path} is not empty. Choose another folder, or add --overwrite (`force=True`).")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"{path} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Choose another disk.")
    with atomic_write(path, keep=False) as folder, _quiet():
        try:
            yield folder
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(first_line(error).replace(str(folder), str(path))) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without notes on a folder that will have another name."""
    notes = logging.getLogger("modeling_llm2slm")
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notes.setLevel(level)


def composite_config(checkpoint: str | Path, **hub: Any) -> LLM2SLMConfig:
    """The config of what must be a composite."""
    config = load(AutoConfig, checkpoint, **hub)
    if not isinstance(config, LLM2SLMConfig):
        raise ValueError(f"{checkpoint} is a {config.model_type} model, not a composite of an LLM and an SLM.")
    return config


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def dtype_of(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype in which no floating tensor of these is rounded, whatever a config says."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int | str = "1GB",
) -> int:
    """
    Write tensors in shards, of which one at a time is in memory; of mapped tensors that keep their dtype, none is.

    Args:
        folder: Where the shards and their index go.
        tensors: By name, without those that are tied to others.
        dtypes: The dtype of those that do not keep their own.
        max_shard_size: The size of a shard, and so of the memory needed.

    Returns:
        The number of files.
    """
    plan = split_state_dict_into_shards_factory(
        {name: tensor.numel() * dtypes.get(name, tensor.dtype).itemsize for name, tensor in tensors.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in tqdm(plan.filename_to_tensors.items(), desc="Writing model shards"):
        shard = {name: tensors[name].detach().to(dtypes.get(name)).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next is made: one at a time
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)


def save_without_weights(model: Any, folder: Path, name: str) -> None:
    """Config, generation config, code and card."""
    model.save_pretrained(folder, state_dict={}, card={"name": name})
    (folder / WEIGHTS).unlink(missing_ok=True)


def copy_processor(source: str | Path, folder: Path, report: Report) -> None:
    """The processor of a checkpoint, if it has one."""
    processor = processor_of(source)
    if processor is not None:
        processor.save_pretrained(folder)
    report.add("processor", "none in the source" if processor is None else "carried over")


def processor_of(source: str | Path) -> LLM2SLMProcessor | None:
    """The processor of a checkpoint. Of one that has none, transformers may load a tokenizer without a vocabulary."""
    try:
        processor = load(AutoProcessor, source)
    except OSError:
        return None
    return processor if isinstance(processor, LLM2SLMProcessor) else None
