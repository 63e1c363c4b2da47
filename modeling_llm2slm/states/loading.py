"""Load checkpoints, with errors of one sentence that name the checkpoint and the cause."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.filesize import decimal
from transformers import PreTrainedConfig

from ..checkpoint_llm2slm import LLM_PREFIX
from ..checks import check_sizes
from ..configuration_llm2slm import LLM2SLMConfig, decoder_sizes, llm_sizes
from ..data.causes import unreadable_file
from ..data.resources import free_memory
from ..files_llm2slm import first_line, open_weights, shape_of, weight_files
from .files import check_files, damaged_file
from .fingerprints import checkpoint_folder, tensors_of


logger = logging.getLogger(__name__)

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NO_FOLDER = "there is no such folder"
UNREACHABLE = ("We couldn't connect to", "offline mode is enabled", "Cannot reach")  # words of its two libraries


def load(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """
    Call `auto_class.from_pretrained`, and turn every failure into an `OSError` of one sentence. Values that no model
    can have are failures too.
    """
    check_files(Path(path, kwargs.get("subfolder") or ""))
    with one_sentence(path):
        # Without this default, transformers asks at the terminal whether it may run the checkpoint's code.
        loaded = auto_class.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
        if isinstance(loaded, PreTrainedConfig):
            for sizes in (llm_sizes(loaded), decoder_sizes(loaded)):
                if getattr(sizes, "hidden_size", None) is not None:
                    check_sizes(sizes, "config.json")
    return loaded


def load_model(auto_class: Any, path: str | Path, *, allow_nonfinite: bool = False, **kwargs: Any) -> Any:
    """
    Load a complete model, from safetensors only.

    Args:
        auto_class: Its class.
        path: A folder, or a name on the Hub.
        allow_nonfinite: Also load weights that are not finite.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        OSError: If it cannot be loaded, a weight is missing, or a weight is not finite.
    """
    model, loading = load(auto_class, path, output_loading_info=True, use_safetensors=True, **kwargs)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise OSError(f"{path} is incomplete: {len(missing)} weights are missing, among them {missing[0]}.")
    # The files of a plain LLM may hold more than is needed, but an SLM has all of its layers.
    unused = sorted(name for name in loading["unexpected_keys"] if name.startswith("decoder."))
    if unused and model.config.model_type == LLM2SLMConfig.model_type:
        logger.warning(
            f"{path} holds {len(unused)} weights of the SLM that are not used, among them {unused[0]}. Check the "
            "sizes in config.json."
        )
    if not allow_nonfinite:
        check_finite(model.state_dict(), path)
    return model


def check_memory(path: str | Path, dtype: Any, llm_dtype: Any = None, more: int = 0) -> None:
    """
    Raise `OSError`, before a checkpoint is loaded, if the memory that it needs is not free. Weights that keep their
    dtype are mapped from their files and need none; those whose files are not on this machine are not counted.

    Args:
        path: The checkpoint, a folder or a name on the Hub.
        dtype: The dtype to load it in.
        llm_dtype: The dtype of the LLM of an LLM-to-SLM model. Default: `dtype`.
        more: Bytes that are needed in addition to the weights.
    """
    try:
        tensors = open_weights(weight_files(checkpoint_folder(path), on_hub=False))
    except (OSError, ValueError):  # loading says what is wrong
        tensors = {}
    needed = more
    for name, tensor in tensors.items():
        target = (llm_dtype or dtype) if name.startswith(LLM_PREFIX) else dtype
        stored = DTYPES.get(tensor.get_dtype())
        target = getattr(torch, str(target).removeprefix("torch."), None)  # none: "auto" keeps the dtype
        if stored is not None and target not in (None, stored):
            needed += math.prod(shape_of(tensor)) * target.itemsize
    if needed > (free := free_memory()):
        raise OSError(
            f"{path} needs {decimal(needed)} of memory in {dtype}, but {decimal(free)} are free. Free some memory, or "
            "take a smaller model or a machine with more memory."
        )


def check_finite(tensors: Mapping[str, Any], path: str | Path) -> None:
    """Raise `OSError` for the first of a checkpoint's tensors, or slices of them, that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        values = tensor[...]
        if not values.is_floating_point() or values.is_meta or not values.numel():
            continue
        values = values.float() if values.itemsize == 1 else values  # there is no minimum of 8-bit floats
        if not all(extreme.isfinite() for extreme in torch.aminmax(values)):  # much faster than `isfinite` of each
            raise OSError(
                f"{path} is damaged: {name}{_place(path, name)} holds values that are not finite. Take another copy "
                "or an earlier checkpoint; generate, evaluate and serve load it as it is with --allow-nonfinite."
            )


def _place(path: str | Path, name: str) -> str:
    """Return the file that holds a tensor, as words."""
    try:
        return f" in {tensors_of(path, name)[name].name}"
    except (OSError, ValueError, KeyError):
        return ""


def to_device(model: Any, device: Any) -> Any:
    """Move a model to a device; raise `ValueError` of one sentence if there is no such device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such name; torch built without it
        fix = " Use --device cpu, or install PyTorch with CUDA." if str(device).startswith("cuda") else ""
        cause = first_line(error).removesuffix(".")
        raise ValueError(f"The model cannot be moved to {device}: {cause}.{fix}") from error


@contextmanager
def one_sentence(path: str | Path) -> Iterator[None]:
    """Turn any failure with a checkpoint into an `OSError` of one sentence."""
    try:
        yield
    except Exception as error:  # a damaged checkpoint raises a different class for each file and format
        raise OSError(_sentence(str(path), error)) from error


def _sentence(path: str, error: Exception) -> str:
    has_no_config = str(error).startswith("Unrecognized model in") or "a file named config.json" in str(error)
    if has_no_config and Path(path).is_dir() and not Path(path, "config.json").exists():
        if Path(path, "adapter_config.json").exists():
            return f"{path} is an adapter, not a checkpoint. Merge it with its base: `llm2slm convert merge`."
        return f"{path} is not a checkpoint: it has no config.json."
    if str(error).startswith(f"{path} cannot be loaded: "):
        return first_line(error)
    unreadable = (unreadable_file(path) or damaged_file(path)) if Path(path).exists() else None
    if unreadable is not None:
        return f"{path} cannot be loaded: {unreadable}"
    cause = _cause(path, error)
    if cause.startswith(NO_FOLDER) and any(words in cause for words in UNREACHABLE):
        cause = f"{NO_FOLDER}, and the Hub cannot be reached. Check the path, or download the model first."
    return f"{path} cannot be loaded: {cause}"


def _cause(path: str, error: Exception) -> str:
    """Return the cause of an error. For a missing folder, transformers reports a bad name or an unreachable Hub."""
    if Path(path).exists():
        if isinstance(error, RecursionError):
            return "one of its files is nested too deeply."
        if isinstance(error, StrictDataclassError | KeyError):  # the first line of the former lacks the value
            return f"a value in one of its JSON files is invalid ({first_line(error.__cause__ or error)}). Correct it."
        return first_line(error)
    if path.endswith(".json"):
        return "there is no such file"
    is_folder = path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    return NO_FOLDER if is_folder else f"{NO_FOLDER}, and on the Hub: {first_line(error)}"


def with_article(kind: str) -> str:
    """Return the type of a model with its article: `a gpt2`, `an llm2slm`."""
    return f"{'an' if kind.startswith(('a', 'e', 'i', 'o', 'llm2slm')) else 'a'} {kind}"
