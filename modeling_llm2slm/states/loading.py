"""Load checkpoints, with errors of one sentence that name the checkpoint and the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files_llm2slm import first_line


NO_FOLDER = "there is no such folder"
UNREACHABLE = ("We couldn't connect to", "offline mode is enabled", "Cannot reach")  # words of its two libraries


def load(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained`, and turn every failure into an `OSError` of one sentence."""
    with one_sentence(path):
        # Without this default, transformers asks at the terminal whether it may run the checkpoint's code.
        return auto_class.from_pretrained(path, **{"trust_remote_code": False, **kwargs})


def load_model(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """Load a complete model, from safetensors only; a missing weight raises `OSError`."""
    model, loading = load(auto_class, path, output_loading_info=True, use_safetensors=True, **kwargs)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise OSError(f"{path} is incomplete: {len(missing)} weights are missing, among them {missing[0]}.")
    return model


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
        return f"{path} is not a checkpoint: it has no config.json."
    cause = _cause(path, error)
    if cause.startswith(NO_FOLDER) and any(words in cause for words in UNREACHABLE):
        cause = f"{NO_FOLDER}, and the Hub cannot be reached. Check the path, or download the model first."
    return f"{path} cannot be loaded: {cause}"


def _cause(path: str, error: Exception) -> str:
    """Return the cause of an error. For a missing folder, transformers reports a bad name or an unreachable Hub."""
    if Path(path).exists():
        return "one of its files is nested too deeply." if isinstance(error, RecursionError) else first_line(error)
    if path.endswith(".json"):
        return "there is no such file"
    is_folder = path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    return NO_FOLDER if is_folder else f"{NO_FOLDER}, and on the Hub: {first_line(error)}"


def with_article(kind: str) -> str:
    """Return the type of a model with its article: `a gpt2`, `an llm2slm`."""
    return f"{'an' if kind.startswith(('a', 'e', 'i', 'o', 'llm2slm')) else 'a'} {kind}"
