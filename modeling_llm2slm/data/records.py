"""Records of a run: JSON files, package versions, settings without secrets."""

from __future__ import annotations

import json
import math
import platform
import reprlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..files_llm2slm import first_line
from .atomic import atomic_write
from .parsing import read_json


class Kind(NamedTuple):
    """
    What a value in a JSON file may be.

    Args:
        words: How messages call it, such as "a whole number".
        holds: Returns whether a value is one.
    """

    words: str
    holds: Callable[[Any], bool]


def whole_number(minimum: float = -math.inf, maximum: float = math.inf) -> Kind:
    """Return the kind of whole numbers within bounds."""
    bounds = [f"{word} {bound:,}" for word, bound in (("from", minimum), ("to", maximum)) if math.isfinite(bound)]
    return Kind(
        " ".join(["a whole number", *bounds]),
        lambda value: type(value) is int and minimum <= value <= maximum,
    )


WHOLE, COUNT = whole_number(), whole_number(minimum=0)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))


def mapping_to(kind: Kind) -> Kind:
    """Return the kind of mappings whose values are all of one kind."""
    return Kind(
        f"a mapping from names, each to {kind.words}",
        lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())),
    )


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists whose entries are all of one kind."""
    return Kind(
        f"a list, with {kind.words} in each place",
        lambda value: isinstance(value, list) and all(map(kind.holds, value)),
    )


def record_of(fields: Mapping[str, Kind]) -> Kind:
    """Return the kind of mappings that have these fields, each of its kind."""
    return Kind(
        f"a mapping with {', '.join(fields)}",
        lambda value: (
            isinstance(value, dict) and all(name in value and kind.holds(value[name]) for name, kind in fields.items())
        ),
    )


def read_record(
    path: str | Path,
    fix: str,
    fields: Mapping[str, Kind] | None = None,
    *,
    optional: bool = False,
    what: str = "a mapping",
) -> dict[str, Any]:
    """
    Return the mapping in a JSON file.

    Args:
        path: The file.
        fix: What to do if it is damaged: the last sentence of the error.
        fields: What the fields that are read from it may be.
        optional: Whether these fields may be missing or null.
        what: What the file should hold, for the error.

    Raises:
        ValueError: If the file is not JSON, holds no mapping, or a field is missing or of another kind.
    """
    try:
        value = read_json(path)
    except ValueError as error:  # also a file that is not UTF-8
        cause = first_line(error).removeprefix(f"{path} ").removesuffix(".")
        raise ValueError(f"{path} is truncated or corrupted and cannot be read (it {cause}). {fix}") from error
    check_fields(path, value, fix, fields or {}, optional=optional, what=what)
    return value


def check_fields(
    path: str | Path,
    value: Any,
    fix: str,
    fields: Mapping[str, Kind],
    *,
    optional: bool = False,
    what: str = "a mapping",
) -> None:
    """Raise `ValueError`, see [`read_record`], unless a value in a file is a mapping with fields of these kinds."""
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: it does not hold {what}. {fix}")
    for name, kind in fields.items():
        if optional and value.get(name) is None:
            continue
        if name not in value or not kind.holds(value[name]):
            given = reprlib.repr(value[name]) if name in value else "missing"
            raise ValueError(f"{path} cannot be read: {name} is {given}, but it must be {kind.words}. {fix}")


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
