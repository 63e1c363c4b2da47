"""Bounded parsing of JSON and YAML: no text, whatever its size and depth, costs more than a bounded time or memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .text import read_text


MAX_DEPTH = 100  # levels of lists and mappings; Python's own limit depends on the caller
MAX_NODES = 100_000  # values of a YAML text, those behind aliases included
MAX_YAML_BYTES, MAX_JSON_BYTES = 2**20, 2**26


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; raise `ValueError` with the cause if it is not JSON or is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ValueError(_cause(error)) from None
    brackets = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if brackets > MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise `ValueError` if lists and mappings are nested too deeply."""
    nested = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [each for each in nested if isinstance(each, dict | list)]
        if not nested:
            return
        nested = [child for each in nested for child in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def read_json(path: str | Path) -> Any:
    """
    Return what a JSON file holds, see [`parse_json`].

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is too large, is not UTF-8 or is not JSON; with its path.
    """
    return _parsed(path, parse_json, "JSON", MAX_JSON_BYTES)


def read_yaml(path: str | Path) -> Any:
    """
    Return what a YAML file holds, see [`parse_yaml`].

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is too large, is not UTF-8 or is not YAML; with its path.
    """
    return _parsed(path, parse_yaml, "YAML", MAX_YAML_BYTES)


def _parsed(path: str | Path, parse: Callable[[str], Any], kind: str, limit: int) -> Any:
    content = read_text(path, limit)
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}: {error}.") from None


def parse_yaml(text: str) -> Any:
    """
    Return what a YAML text holds, by the rules of YAML 1.2.

    Raises:
        ValueError: With the cause, if the text is not YAML, has a key twice, is nested too deeply, or grows too large
            by its aliases.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # those of wrong tags
        raise ValueError(_cause(error)) from None


def _cause(error: Exception) -> str:
    if "int_max_str_digits" in str(error):
        return "it has a number with thousands of digits"
    return (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")[:500]


class _Loader(yaml.SafeLoader):
    """
    Reads numbers, switches and texts by YAML 1.2: `1e-3` and `012` are decimal numbers; `no`, `on`, `1:30` and
    `2026-01-31` are texts.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._total = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as the base class does, and count it with all that an alias repeats."""
        is_alias, before = self.check_event(yaml.AliasEvent), self._total
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise ValueError("an alias stands inside the value that it repeats")
        self._total += self._sizes[id(node)] if is_alias else 1
        if self._total > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} values, with those that its aliases repeat")
        if not is_alias:
            self._sizes[id(node)] = self._total - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping as the base class does; raise `ValueError` if a key stands in it twice."""
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise ValueError(f"the key {key.value[:100]!r} stands in one mapping twice")
                keys.add((key.tag, key.value))
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Return an integer of YAML 1.2."""
        text = str(self.construct_scalar(node))
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


_REPLACED = ("bool", "float", "int", "timestamp")
_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", "(?i:true|false)", "tTfF"),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+", "-+0123456789"),  # before float, which matches integers too
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
