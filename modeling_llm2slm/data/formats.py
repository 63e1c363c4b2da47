"""Formats of data files: which ones there are, and how the rows of each are read. `datasets` reads Parquet."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .parsing import parse_json
from .text import decode_lines, text_problem_of, without_end


# The format of a file, by the extension of its name (before ".gz").
FILE_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
ROW_ERROR = "_error"  # a column that says why a row could not be read
MAX_ROW_BYTES, MAX_ARRAY_BYTES = 2**24, 2**31
TOO_LONG = f"has more than {MAX_ROW_BYTES:,} bytes"
RETURN = "\udc0d"  # stands for a carriage return that ends no line, at which the reader of tables would stop
# The strings, brackets and commas of a JSON text. Nothing else of it says where a value ends.
JSON_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)


def file_format_of(path: Path) -> str | None:
    """Return the format of a file, by its name; `None` for an unknown extension."""
    return FILE_FORMATS.get(_extension(path))


def unknown_format(source: str) -> str:
    """Return the message about a file whose name does not tell its format."""
    return f"{source} must end in {', '.join(FILE_FORMATS)}: the extension decides the format."


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
    except (EOFError, zlib.error, gzip.BadGzipFile):  # a damaged archive: its reader reports the details
        return False


def parse_rows(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """
    Yield each row of a file of any format but Parquet; for a row that cannot be read, `{ROW_ERROR: reason}`.

    The reason names the row by its number. Where the rest of the file cannot be read, it is the last row.
    """
    with open_file(path, "rb") as file:
        try:
            for number, row in enumerate(islice(_rows_of(path, file), limit)):
                yield {ROW_ERROR: f"row {number} {row}"} if isinstance(row, str) else row
        except (OSError, EOFError, zlib.error) as error:
            yield {ROW_ERROR: f"the rest cannot be read ({error})"}


def _rows_of(path: Path, file: Any) -> Iterator[dict[str, Any] | str]:
    """Yield rows, and a problem, such as `"is not JSON"`, in place of one that cannot be read."""
    file_format = file_format_of(path)
    if file_format == "csv":
        return _table_rows(file, "\t" if _extension(path) == ".tsv" else ",")
    if file_format == "json":
        return _json_lines(_lines(file)) if is_jsonl(path) else _json_rows(file)
    return _text_rows(file)


def _lines(file: Any) -> Iterator[bytes]:
    """Yield each line, with its end. Of one longer than `MAX_ROW_BYTES`, the rest is left out."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES + 1)


def _text_rows(file: Any) -> Iterator[dict[str, Any] | str]:
    """Yield each line of a text file in a column `text`."""
    for line in decode_lines(_lines(file)):
        problem = TOO_LONG if len(line) > MAX_ROW_BYTES else text_problem_of(line)
        yield {"text": without_end(line)} if problem is None else problem


def _json_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | str]:
    for line in lines:
        # No JSON value holds a raw carriage return: in these files, it may end a line.
        for part in line.removeprefix(BOM_UTF8).splitlines():
            if content := part.strip():
                yield _json_row(content)


def _json_row(content: bytes) -> dict[str, Any] | str:
    if len(content) > MAX_ROW_BYTES:
        return TOO_LONG
    try:
        row = parse_json(content.decode("utf-8"))
    except ValueError as error:
        return f"is not JSON ({error})"
    return row if isinstance(row, dict) else "is not a JSON object"


def _json_rows(file: Any) -> Iterator[dict[str, Any] | str]:
    """Yield each row of a `.json` file: JSON lines, a list of objects, or one object of rows' values or of columns."""
    lines = _lines(file)
    first = next((line for line in lines if line.removeprefix(BOM_UTF8).strip()), b"").removeprefix(BOM_UTF8)
    if not first.lstrip().startswith(b"[") and isinstance(_json_row(first.strip()), dict):
        yield from _json_lines(chain([first], lines))
        return
    content = first + file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise OSError(f"it has more than {MAX_ARRAY_BYTES:,} bytes: use JSON lines")
    if first.lstrip().startswith(b"["):
        yield from _array_rows(content)
        return
    value = _json_row(content.strip())
    if isinstance(value, dict) and all(isinstance(cells, list) for cells in value.values()):
        yield from (dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False))
    else:
        yield value


def _array_rows(content: bytes) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a JSON array, each found by the brackets and strings in it, as a bad one may not parse."""
    start, depth = content.index(b"[") + 1, 0
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
    """Yield each row of a table. Every cell is text: empty cells, "NA" and numbers too."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines, names = _TableLines(file), None  # names: those of the header
    reader = csv.reader(lines, delimiter=separator)
    while not lines.are_exhausted:
        lines.are_too_long = False
        try:
            cells = next(reader, [])
        except csv.Error:  # a cell is longer than the limit
            yield TOO_LONG
            continue
        if not cells or (len(cells) == 1 and cells[0].isspace()):
            continue
        if names is None:
            names = _unique(cells)
            if problem := next(filter(None, map(text_problem_of, names)), None):
                raise OSError(f"its header {problem}")
            continue
        problem = TOO_LONG if lines.are_too_long else next(filter(None, map(text_problem_of, cells)), None)
        if lines.are_exhausted:  # in the middle of a row
            problem = "has a quotation mark that is not closed"
        elif problem is None and any(cells[len(names) :]):
            problem = f"has {len(cells)} cells, but the header has {len(names)}"
        texts = (cell.replace(RETURN, "\r") for cell in cells)
        yield dict(zip(names, texts, strict=False)) if problem is None else problem


class _TableLines(Iterator[str]):
    """The lines of a table for a reader, which has no other way to tell that one is too long or the last one torn."""

    def __init__(self, file: Any):
        self.are_exhausted = self.are_too_long = False
        self._lines = decode_lines(_lines(file))

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.are_exhausted = True
            raise
        self.are_too_long |= len(line) > MAX_ROW_BYTES
        return re.sub("\r(?!\n)", RETURN, line)


def _unique(names: list[str]) -> list[str]:
    """Return the names of columns with a name for each that has none, and a number on each that is repeated."""
    unique: dict[str, None] = {}
    for index, given in enumerate(names):
        name = given.replace(RETURN, "\r") or f"Unnamed: {index}"
        repeated = sum(other == given for other in names[:index])
        unique[f"{name}.{repeated}" if repeated else name] = None
    return list(unique)
