"""Records of a run: JSON files, package versions, settings without secrets."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .atomic import atomic_write


def write_json(path: str | Path, value: Any) -> None:
    """Write a value to a JSON file, with an atomic write."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may hold any bytes


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
