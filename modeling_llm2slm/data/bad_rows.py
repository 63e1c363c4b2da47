"""Rows that cannot be used: how they are found, and reported as an error or, where they are skipped, as a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..settings import shown
from .formats import ROW_ERROR, file_format_of


logger = logging.getLogger(__name__)

LISTED = 10  # row numbers in a message


def is_text(value: Any) -> bool:
    """Return whether a value is valid text: JSON allows strings with lone surrogates, which cannot be encoded."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def text_problem(row: Mapping[str, Any], columns: Sequence[str], number: int) -> str | None:
    """
    Return why a row cannot be used, or `None` if each of the columns holds text.

    Args:
        row: The row.
        columns: The columns that must hold text.
        number: The row's number in its source, for the message.
    """
    for column in columns:
        if not is_text(row.get(column)):
            return row.get(ROW_ERROR) or f"the {column} of row {number} is {shown(row.get(column))}, not text"
    return None


def check_columns(source: str, needed: Sequence[str], existing: Sequence[str]) -> None:
    """Raise `ValueError` if one of the needed columns is missing."""
    is_text_file = file_format_of(Path(source)) == "text"
    for column in needed:
        if column not in existing:
            raise ValueError(
                f"{source} has prompts but no targets: use a file with a column for each, such as a .jsonl, or "
                "compare with an LLM: `llm2slm evaluate --against`."
                if is_text_file
                else f"{source} has no column {column!r}; it has {', '.join(map(repr, existing))}. "
                "Name the columns with --prompt-column and --target-column (prompt_column, target_column)."
            )


def report_bad_rows(source: str, bad: Mapping[int, str], skip: bool) -> None:
    """
    Report rows that cannot be used.

    Args:
        source: Where they come from.
        bad: The reason for each row number.
        skip: Log a warning, because the rows are skipped, instead of raising an error.

    Raises:
        ValueError: Unless `skip` is set; with the reason for the first row.
    """
    numbers = ", ".join(map(str, list(bad)[:LISTED])) + (", ..." if len(bad) > LISTED else "")
    reasons = list(bad.values())
    if skip:
        skipped = f"{len(bad)} bad rows were" if len(bad) > 1 else "1 bad row was"
        # The last reason may be that the rest of the file cannot be read.
        logger.warning(f"{source}: {skipped} skipped: {numbers}. The last: {reasons[-1]}.")
        return
    them = "them" if len(bad) > 1 else "it"
    others = f" There are {len(bad)} bad rows: {numbers}." if len(bad) > 1 else ""
    raise ValueError(
        f"{source}: {reasons[0]}.{others} Fix {them}, or skip {them} with --skip-bad-rows (skip_bad_rows)."
    )


def good_rows(source: str, numbers: Sequence[int], problems: Mapping[int, str], skip: bool) -> list[int]:
    """
    Report rows that have a problem, see [`report_bad_rows`], and return the indices of all others.

    Args:
        source: Where the rows come from.
        numbers: The row number of each row.
        problems: What is wrong with some of the rows, by index: `"is too long"`.
        skip: See [`report_bad_rows`].

    Raises:
        ValueError: Unless `skip` is set, if there are problems; in any case if no row is left.
    """
    reasons = {numbers[index]: f"row {numbers[index]} {problem}" for index, problem in problems.items()}
    if len(problems) == len(numbers):
        raise ValueError(f"{source}: no row can be used; {next(iter(reasons.values()))}. Take other data.")
    if reasons:
        report_bad_rows(source, reasons, skip)
    return [index for index in range(len(numbers)) if index not in problems]
