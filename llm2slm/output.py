"""What commands print: lines, tables, sizes, and each error as one sentence."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, ParamSpec, TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from .options import load_module


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

out = Console()
err = Console(stderr=True)
LIBRARY = "modeling_llm2slm"
CAUSES = "modeling_llm2slm.data.causes"
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory", re.IGNORECASE)

# The extra of the package that installs a module; all others belong to `train`.
EXTRAS = {
    "ctranslate2": "benchmark",
    "matplotlib": "benchmark",
    "prometheus_client": "serve",
    "ray": "ray",
    "starlette": "serve",
    "uvicorn": "serve",
}


def print_line(text: str, **style: Any) -> None:
    """Print one line of plain text to standard output: never wrapped, brackets in paths are not markup."""
    out.print(text, soft_wrap=True, highlight=False, markup=False, **style)


def print_note(text: str) -> None:
    """Print one line of plain text to standard error, unless `--quiet` is given. A failure stops no command."""
    if not is_quiet():
        _print_error(text)


def _print_error(text: str, **style: Any) -> None:
    with suppress(OSError, ValueError):
        err.print(text, soft_wrap=True, highlight=False, **{"markup": False, **style})


def set_quiet(quiet: bool) -> None:
    """Choose whether errors and results only are shown: no progress, no notes and no warnings."""
    logging.getLogger(LIBRARY).setLevel(logging.ERROR if quiet else logging.NOTSET)
    if quiet:
        warnings.simplefilter("ignore")


def is_quiet() -> bool:
    """Return whether `--quiet` is given."""
    return logging.getLogger(LIBRARY).level == logging.ERROR


class StandardOutput(io.TextIOWrapper):
    """Standard output in UTF-8, whatever the locale. Its errors name it."""

    def __init__(self, line_buffering: bool, write_through: bool):
        # Paths may hold any bytes, and texts halves of characters: they are escaped.
        options: dict[str, Any] = {"line_buffering": line_buffering, "write_through": write_through}
        super().__init__(open(1, "wb", closefd=False), "utf-8", "backslashreplace", **options)  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write text."""
        with _named_output():
            return super().write(text)

    def flush(self) -> None:
        """Write what is left."""
        with _named_output():
            super().flush()


@contextmanager
def _named_output() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = "Standard output"
        raise


def prepare_streams() -> None:
    """
    Make the standard streams UTF-8, whatever the locale, and read lines that end at a line feed.

    No file that is opened later takes the number of a stream that is closed: reading from it fails, writing results to
    it fails, and errors go nowhere.
    """
    for number, (name, flags) in enumerate((("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))):
        if getattr(sys, name) is None and os.open(os.devnull, flags) == number:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    if type(sys.stdout) is io.TextIOWrapper:  # not one that captures what is printed
        sys.stdout.flush()
        sys.stdout = StandardOutput(sys.stdout.line_buffering, sys.stdout.write_through)


def number_table(*headers: str, **options: Any) -> Table:
    """Return a table with names in its first column and numbers, aligned right, in the others."""
    table = Table(*headers, **options)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def size(count: float) -> str:
    """Return a number of bytes with its unit: `1.6 kB`."""
    return decimal(round(count))


def one_line(text: str) -> str:
    """Return text on one line, with a space for each line break."""
    from modeling_llm2slm.inference.outputs import one_line

    return one_line(text)


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: `1 thread`, `1,200 outputs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def resumable(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Tell the user of a command that resumes what to do after Ctrl-C, unless the command itself does."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(interrupt) or "Interrupted. Repeat the command to resume.") from None

    return run


def print_interruption(interrupt: KeyboardInterrupt) -> None:
    """Print what the next run does after Ctrl-C."""
    _print_error(str(interrupt) or "Interrupted. Repeat the command to start again.")


def exit_with(error: Exception) -> NoReturn:
    """Print an error as one sentence and exit with status 1. A pipe that its reader closed ends quietly."""
    if not isinstance(error, BrokenPipeError):
        _print_error(f"[bold red]Error:[/] {escape(_sentence(error))}", markup=True)
    for stream in (sys.stdout, sys.stderr):
        if not _can_write(stream):  # what is left in it would fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(1)


def _can_write(stream: Any) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get(error.name or "", "train")
        return f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[{extra}]'"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return "There is not enough memory. Take smaller batches, shorter texts or fewer beams, or a larger machine."
    if isinstance(error, RuntimeError):  # of a library, about values that nothing has checked
        cause = " ".join(str(error).split())[:500].removesuffix(".") or type(error).__name__
        return f"The command failed: {cause}. Set LLM2SLM_DEBUG=1 to see where."
    causes = load_module(CAUSES)
    sentence = causes.sentence_of(error) if isinstance(error, OSError) else None
    return sentence or " ".join(str(error).split()) or type(error).__name__
