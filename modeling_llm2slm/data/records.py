"""Records of a run: JSON files, package versions, settings without secrets."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files_llm2slm import first_line
from .atomic import atomic_write


def read_json(path: str | Path, fix: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Return the object in a JSON file that this package wrote.

    Args:
        path: The file.
        fix: What to do if it is damaged: the last sentence of the error.
        fields: Types of the fields that are read from it.

    Raises:
        ValueError: If the file is not JSON, holds no object, or a field is missing or has another type.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a file that is not UTF-8
        raise ValueError(f"{path} is damaged ({first_line(error)}). {fix}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not a mapping. {fix}")
    for name, kind in (fields or {}).items():
        if not isinstance(value.get(name), kind) or isinstance(value[name], bool):
            given = repr(value[name]) if name in value else "missing"
            raise ValueError(f"{path} is damaged: {name} is {given}. {fix}")
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write a value to a JSON file, with an atomic write."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    names = ("accelerate", "datasets", "rouge-score", "sacrebleu", "tokenizers", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tokens such as `hub_token`, so that they can be saved and published."""
    return {key: value for key, value in settings.items() if not key.endswith("token")}


PATHS = ("model", "train_data", "validation_data")


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a training with the names of its model and data in place of their paths."""
    return {key: Path(value).name if key in PATHS and value else value for key, value in settings.items()}
