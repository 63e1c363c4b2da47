"""Formats of data files: which ones there are, how `datasets` reads each of them, and how JSON lines are read here."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any


# The builder of `datasets` for a file, by the extension of its name (before ".gz").
FILE_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
ROW_ERROR = "_error"  # a column that says why a row could not be read


def file_format_of(path: Path) -> str | None:
    """Return the builder of `datasets` for a file, by its name; `None` for an unknown extension."""
    return FILE_FORMATS.get(_extension(path))


def is_jsonl(path: Path) -> bool:
    """Return whether a name ends in `.jsonl` or `.jsonl.gz`."""
    return path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]


def _extension(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")


def open_file(path: Path, mode: str, **options: Any) -> Any:
    """Open a file, which may be compressed."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, **options)


def is_empty(path: Path) -> bool:
    """Return whether a file has no content."""
    try:
        with open_file(path, "rb") as content:
            return not content.read(1)
    except (OSError, EOFError):  # a damaged archive: its reader reports the details
        return False


def reading_options(path: Path) -> dict[str, Any]:
    """Return the arguments of `load_dataset` that make every cell of a table a string."""
    if file_format_of(path) != "csv":
        return {}
    from datasets import Features, Value  # here, so that prompts can be read without it

    # Empty cells, "NA" and numbers are text too: a type guessed from the first rows may fail on a later one.
    options: dict[str, Any] = {"keep_default_na": False, "sep": "\t" if _extension(path) == ".tsv" else ","}
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        names = next((row for row in csv.reader(file, delimiter=options["sep"]) if row), [])
    if names and "" not in names and len(set(names)) == len(names):  # otherwise the reader invents names
        options["features"] = Features({name: Value("string") for name in names})
    return options


def parse_lines(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each row of a file of JSON lines; for a line that cannot be read, `{ROW_ERROR: reason}`."""
    with open_file(path, "rb") as file:
        try:
            lines = (line for text in file for line in text.removeprefix(BOM_UTF8).splitlines() if line.strip())
            for number, line in enumerate(islice(lines, limit)):
                try:
                    row = json.loads(line.decode("utf-8"))
                    yield row if isinstance(row, dict) else {ROW_ERROR: f"row {number} is not a JSON object"}
                except ValueError as error:
                    yield {ROW_ERROR: f"row {number} is not JSON ({error})"}
        except (OSError, EOFError, zlib.error) as error:
            yield {ROW_ERROR: f"the rest cannot be read ({error})"}
