"""Formats of data files: which ones there are, and how JSON and tables are read, row by row."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from .parsing import parse_json


# The builder of `datasets` for a file, by the extension of its name (before ".gz").
FILE_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
ROW_ERROR = "_error"  # a column that says why a row could not be read
READ_BYTES, MAX_ROW_BYTES, MAX_ARRAY_BYTES = 2**16, 2**24, 2**31
TOO_LONG = f"has more than {MAX_ROW_BYTES:,} bytes"
# The strings, brackets and commas of a JSON text. Nothing else of it says where a value ends.
JSON_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)


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


def is_parsed(path: Path) -> bool:
    """Return whether [`parse_rows`] reads a file, rather than `datasets`."""
    return is_jsonl(path) or file_format_of(path) in ("json", "csv")


def is_table(path: Path) -> bool:
    """Return whether all rows of a file have the same columns, which all hold text."""
    return file_format_of(path) == "csv"


def parse_rows(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """
    Yield each row of a file for which [`is_parsed`] holds; `{ROW_ERROR: reason}` for a row that cannot be read.

    The reason names the row by its number. Where the rest of the file cannot be read, it is the last row.
    """
    with open_file(path, "rb") as file:
        try:
            for number, row in enumerate(islice(_rows_of(path, file), limit)):
                yield {ROW_ERROR: f"row {number} {row}"} if isinstance(row, str) else row
        except (OSError, EOFError, zlib.error) as error:
            yield {ROW_ERROR: f"the rest cannot be read ({error})"}


def _rows_of(path: Path, file: Any) -> Iterator[dict[str, Any] | str]:
    """Yield rows, and a problem, such as `"is too long"`, in place of one that cannot be read."""
    if is_table(path):
        return _table_rows(file, "\t" if _extension(path) == ".tsv" else ",")
    if not is_jsonl(path) and _starts_an_array(path):
        return _array_rows(file)
    return _json_lines(file)


def _lines(file: Any) -> Iterator[bytes]:
    """Yield each line, with its end. One longer than `MAX_ROW_BYTES` is cut off after more than as many bytes."""
    rest = bytearray()
    while chunk := file.read1(READ_BYTES):
        if b"\n" in chunk or b"\r" in chunk:
            *lines, last = (rest + chunk).splitlines(keepends=True)
            yield from map(bytes, lines)
            rest = bytearray(last)
            if last.endswith((b"\n", b"\r")):
                yield bytes(last)
                rest = bytearray()
        elif len(rest) <= MAX_ROW_BYTES:
            rest += chunk
    if rest:
        yield bytes(rest)


def _json_lines(file: Any) -> Iterator[dict[str, Any] | str]:
    for line in _lines(file):
        if content := line.removeprefix(BOM_UTF8).strip():
            yield _json_row(content)


def _json_row(content: bytes) -> dict[str, Any] | str:
    if len(content) > MAX_ROW_BYTES:
        return TOO_LONG
    try:
        row = parse_json(content.decode("utf-8"))
    except ValueError as error:
        return f"is not JSON ({error})"
    return row if isinstance(row, dict) else "is not a JSON object"


def _starts_an_array(path: Path) -> bool:
    try:
        with open_file(path, "rb") as file:
            return file.read(1024).removeprefix(BOM_UTF8).lstrip().startswith(b"[")
    except (OSError, EOFError, zlib.error):  # a damaged archive: its reader reports the details
        return False


def _array_rows(file: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a JSON array, each found by the brackets and strings in it, as a bad one may not parse."""
    content = file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise OSError(f"it has more than {MAX_ARRAY_BYTES:,} bytes: use JSON lines")
    start = content.index(b"[") + 1
    depth = 0
    for mark in JSON_MARKS.finditer(content, start):
        kind = mark.group()[:1]
        if kind in (b"[", b"{"):
            depth += 1
        elif depth and kind in (b"]", b"}"):
            depth -= 1
        elif depth == 0 and kind in (b",", b"]"):
            if entry := content[start : mark.start()].strip():
                yield _json_row(entry)
            start = mark.end()
            if kind == b"]":
                return
    raise EOFError("the array does not end")


def _table_rows(file: Any, separator: str) -> Iterator[dict[str, Any] | str]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    too_long = False

    def texts() -> Iterator[str]:
        nonlocal too_long
        for line in _lines(file):
            too_long |= len(line) > MAX_ROW_BYTES
            yield line.decode("utf-8", "surrogateescape")  # an invalid byte spoils only its cell

    reader, names = csv.reader(texts(), delimiter=separator, strict=True), None  # names: those of the header
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield TOO_LONG if too_long else f"is not CSV ({error})"
            too_long = False
            continue
        if cells is None:
            return
        if names is None:
            names = _column_names(cells)
        elif too_long:
            yield TOO_LONG
        elif any(cells[len(names) :]):
            yield f"has {len(cells)} cells, but the header has {len(names)}"
        elif cells:
            yield dict(zip_longest(names, cells[: len(names)]))
        too_long = False


def _column_names(cells: list[str]) -> list[str] | None:
    """Return names for the columns of a header; repeated ones get a number. An empty line is no header."""
    names: list[str] = []
    for cell in cells:
        name = cell.removeprefix("\ufeff")
        names.append(f"{name}.{cells[: len(names)].count(cell)}" if name in names else name)
    return names or None
