"""Formats of data files: which ones there are, and how the rows of each are read. `datasets` reads Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from .text import decode_lines, text_problem_of, without_end


# The format of a file, by the extension of its name (before ".gz").
FILE_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
ROW_ERROR = "_error"  # a column that says why a row could not be read


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


def parse_rows(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each row of a file of any format but Parquet; for a row that cannot be read, `{ROW_ERROR: reason}`."""
    parsers = {"csv": _parse_table, "json": _parse_json}
    parse = parse_lines if is_jsonl(path) else parsers.get(file_format_of(path) or "text", _parse_text)
    return parse(path, limit)


def parse_lines(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each row of a file of JSON lines; for a line that cannot be read, `{ROW_ERROR: reason}`."""
    with _opened(path) as (file, damage):
        # No JSON value holds a raw carriage return: in these files, it may end a line.
        lines = (line for text in file for line in text.removeprefix(BOM_UTF8).splitlines() if line.strip())
        for number, line in enumerate(islice(lines, limit)):
            try:
                row = json.loads(line.decode("utf-8"))
                yield row if isinstance(row, dict) else {ROW_ERROR: f"row {number} is not a JSON object"}
            except (ValueError, RecursionError) as error:
                yield {ROW_ERROR: f"row {number} is not JSON ({error})"}
    yield from damage


def _parse_text(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each line of a text file in a column `text`."""
    with _opened(path) as (file, damage):
        for number, line in enumerate(islice(decode_lines(file), limit)):
            problem = text_problem_of(line)
            yield {"text": without_end(line)} if problem is None else {ROW_ERROR: f"row {number} {problem}"}
    yield from damage


def _parse_json(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each row of a `.json` file: JSON lines, a list of objects, or one object of rows' values or of columns."""
    with _opened(path) as (file, damage):
        first = next((line for line in decode_lines(file) if line.strip()), "")
    if not damage and isinstance(_loads(first), dict):
        yield from parse_lines(path, limit)
        return
    with _opened(path) as (file, damage):
        value = _loads("".join(decode_lines(file)))
    if isinstance(value, dict) and all(isinstance(cells, list) for cells in value.values()):
        value = [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    rows = damage or (value if isinstance(value, list) else [value])
    for number, row in enumerate(rows[:limit]):
        yield row if isinstance(row, dict) else {ROW_ERROR: f"row {number} is not a JSON object"}


def _loads(text: str) -> Any:
    """Return the value of JSON, or a row that says why it is none."""
    if problem := text_problem_of(text):
        return [{ROW_ERROR: f"it {problem}"}]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return [{ROW_ERROR: f"it is not JSON ({error})"}]


def _parse_table(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each row of a .csv or .tsv file. Every cell is text: empty cells, "NA" and numbers too."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as (file, damage):
        lines = _Lines(decode_lines(file))
        rows = csv.reader(lines, delimiter="\t" if _extension(path) == ".tsv" else ",")
        used = (cells for cells in rows if cells and not (len(cells) == 1 and cells[0].isspace()))
        names = _unique(next(used, []))
        for number, cells in enumerate(islice(used, limit)):
            problem = next(filter(None, map(text_problem_of, cells)), None)
            if lines.are_exhausted:
                problem = "has a quotation mark that is not closed"
            elif len(cells) > len(names):
                problem = f"has {len(cells)} cells, but the header has {len(names)}"
            texts = [cell.replace(RETURN, "\r") for cell in cells] + [""] * (len(names) - len(cells))
            row: dict[str, Any] = dict(zip(names, texts, strict=False))
            yield row if problem is None else {ROW_ERROR: f"row {number} {problem}"}
    yield from damage


RETURN = "\udc0d"  # stands for a carriage return that ends no line, at which the reader of tables would stop


class _Lines(Iterator[str]):
    """Lines for a reader of tables; whether they are exhausted tells that the last row has no end."""

    def __init__(self, lines: Iterator[str]):
        self.are_exhausted = False
        self._lines = lines

    def __next__(self) -> str:
        try:
            return re.sub("\r(?!\n)", RETURN, next(self._lines))
        except StopIteration:
            self.are_exhausted = True
            raise


def _unique(names: list[str]) -> list[str]:
    """Return the names of columns with a name for each that has none, and a number on each that is repeated."""
    unique: dict[str, None] = {}
    for index, given in enumerate(names):
        name = given.replace(RETURN, "\r") or f"Unnamed: {index}"
        repeated = sum(other == given for other in names[:index])
        unique[f"{name}.{repeated}" if repeated else name] = None
    return list(unique)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Open a file, and add a bad row to the list where the rest of it cannot be read."""
    damage: list[dict[str, Any]] = []
    with open_file(path, "rb") as file:
        try:
            yield file, damage
        except (OSError, EOFError, zlib.error) as error:
            damage.append({ROW_ERROR: f"the rest cannot be read ({error})"})
