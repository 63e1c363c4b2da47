"""
One rule for all text: UTF-8 whatever the locale, without a byte-order mark, in lines that end at a line feed, alone or
after a carriage return.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator


def text_problem_of(text: str) -> str | None:
    """Return what is wrong with text that was decoded with `errors="surrogateescape"`, or `None`."""
    wrong = next((letter for letter in text if "\udc80" <= letter <= "\udcff"), None)
    if wrong is not None:
        return f"is not UTF-8 (byte 0x{ord(wrong) - 0xDC00:02x})"
    return "holds a NUL character, as binary files and UTF-16 do" if "\0" in text else None


def check_text(text: str, where: str) -> str:
    """Return a text that was decoded with `errors="surrogateescape"`; raise `ValueError` if it is not text."""
    problem = text_problem_of(text)
    if problem is not None:
        raise ValueError(f"{where} {problem}. Give the text in UTF-8.")
    return text


def without_end(line: str) -> str:
    """Return a line without the line feed, or carriage return and line feed, that ends it."""
    return line.removesuffix("\r\n" if line.endswith("\r\n") else "\n")


def decode_lines(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield lines of a binary file with their ends, without the mark; wrong bytes become surrogates."""
    for number, line in enumerate(lines):
        text = (line.removeprefix(BOM_UTF8) if number == 0 else line).decode("utf-8", "surrogateescape")
        if text or number:  # a file that holds a mark only has no line
            yield text


def read_text(path: str | os.PathLike, limit: int) -> str:
    """
    Return the content of a text file of at most `limit` bytes.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is larger, or if it is not UTF-8; with the path and the line.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which no such file needs. Check the path.")
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16, not UTF-8. Save it as UTF-8.")
    lines = content.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        problem = text_problem_of(line)
        if problem is not None:
            raise ValueError(f"{path}: line {number} {problem}. Save the file as UTF-8.")
    return "\n".join(lines)


def from_command_line(text: str, where: str) -> str:
    """Return an argument as UTF-8, in whatever encoding Python has decoded it; see [`check_text`]."""
    return check_text(os.fsencode(text).decode("utf-8", "surrogateescape"), where)
