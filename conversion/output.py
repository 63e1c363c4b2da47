"""Output folders of conversions: complete or not written at all, and replaced only on request."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor
from transformers.utils.logging import tqdm

from modeling_llm2slm.configuration_llm2slm import LLM2SLMConfig
from modeling_llm2slm.data.atomic import atomic_write
from modeling_llm2slm.data.output_paths import check_not_input, claimed
from modeling_llm2slm.data.resources import check_disk_space
from modeling_llm2slm.files_llm2slm import INDEX, WEIGHTS, first_line
from modeling_llm2slm.inference.model import LLM2SLMProcessor
from modeling_llm2slm.inference.saving import check_not_replaced
from modeling_llm2slm.states.loading import load, with_article

from .report import Report


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def converts(conversion: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Claim the folder `output` of a conversion before its work, see [`claimed`]."""

    @functools.wraps(conversion)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        values = inspect.signature(conversion).bind(*args, **kwargs).arguments
        with claimed(values["output"], folder=True, overwrite=values.get("overwrite", False)):
            return conversion(*args, **kwargs)

    return run


@contextmanager
def output_folder(
    path: str | Path, inputs: Iterable[Any], needed: int = 0, named: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """
    Yield a temporary folder that becomes `path` at the end.

    Args:
        path: The output folder, which is claimed.
        inputs: What the conversion reads, so the result must not replace it.
        needed: Size of the result in bytes; the disk must have as much free space.
        named: The source of an LLM that the result refers to, so the result must not replace it.

    Raises:
        OSError: If the disk is full, before or during the conversion.
        ValueError: If an input or the LLM is inside `path`.
    """
    path = Path(path)
    check_not_replaced(named, path, emptied=True)
    check_not_input(path, inputs)
    check_disk_space(path, needed)
    with atomic_write(path, keep=False) as folder, _quiet():
        try:
            yield folder
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(first_line(error).replace(str(folder), str(path))) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes that name the temporary folder."""
    logger = logging.getLogger("modeling_llm2slm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def composite_config(checkpoint: str | Path, **hub: Any) -> LLM2SLMConfig:
    """Return the config of an LLM-to-SLM checkpoint; any other model raises `ValueError`."""
    config = load(AutoConfig, checkpoint, **hub)
    if not isinstance(config, LLM2SLMConfig):
        raise ValueError(f"{checkpoint} is {with_article(config.model_type)} model, not an LLM-to-SLM checkpoint.")
    return config


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def dtype_of(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Return the dtype that holds all floating-point tensors without rounding, whatever the config says."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int | str = "1GB",
) -> int:
    """
    Write tensors in shards, at most one of them in memory; mapped tensors that keep their dtype need no memory.

    Args:
        folder: The folder of the shards and their index.
        tensors: Tensors by name, without those that are tied to others.
        dtypes: New dtypes of tensors, by name; the others keep their own.
        max_shard_size: Largest size of a shard, which bounds the memory needed.

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
        del shard  # frees it before the next one is made
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)


def save_without_weights(model: Any, folder: Path, name: str) -> None:
    """Write the config, the generation config, the code and the card of a model."""
    model.save_pretrained(folder, state_dict={}, card={"name": name})
    (folder / WEIGHTS).unlink(missing_ok=True)


def copy_processor(source: str | Path, folder: Path, report: Report) -> None:
    """Copy the processor of a checkpoint, if it has one."""
    processor = processor_of(source)
    if processor is not None:
        processor.save_pretrained(folder)
    report.add("processor", "none in the source" if processor is None else "copied")


def processor_of(source: str | Path) -> LLM2SLMProcessor | None:
    """
    Return the processor of a checkpoint, or `None`.

    transformers may load a tokenizer without a vocabulary from a checkpoint without a processor; it is ignored.
    """
    try:
        processor = load(AutoProcessor, source)
    except OSError:
        return None
    return processor if isinstance(processor, LLM2SLMProcessor) else None
