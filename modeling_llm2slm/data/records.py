"""Records of what a run did: JSON files that are never half there, the versions in use, settings without secrets."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .files import atomic_write


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value to a JSON file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    names = ("accelerate", "datasets", "rouge-score", "sacrebleu", "tokenizers", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without tokens such as `hub_token`, fit to be saved and published."""
    return {key: value for key, value in settings.items() if not key.endswith("token")}
