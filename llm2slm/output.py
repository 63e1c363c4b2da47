"""What commands print: lines, tables, sizes, and each error as one sentence."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

out = Console()
err = Console(stderr=True)

# What to do about an error of the operating system, by its number.
REMEDIES = {
    errno.EACCES: "Change its permissions, or choose another place.",
    errno.EPERM: "Change its permissions, or choose another place.",
    errno.ENOSPC: "Free some space, or choose another disk.",
    errno.EDQUOT: "Free some space, or choose another disk.",
    errno.ENOENT: "Check the path.",
    errno.EEXIST: "It is a file, but a folder is needed: choose another place.",
}

# The extra of the package that installs a module; all others belong to `train`.
EXTRAS = {
    "ctranslate2": "benchmark",
    "matplotlib": "benchmark",
    "prometheus_client": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}


def print_line(text: str, **style: Any) -> None:
    """Print one line of plain text to standard output: never wrapped, brackets in paths are not markup."""
    out.print(text, soft_wrap=True, highlight=False, markup=False, **style)


def print_note(text: str) -> None:
    """Print one line of plain text to standard error."""
    err.print(text, soft_wrap=True, highlight=False, markup=False)


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
    """Tell the user of a command that resumes what to do after Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print_note("Interrupted. Repeat the command to resume.")
            raise

    return run


def exit_with(error: Exception) -> NoReturn:
    """Print an error as one sentence and exit with status 1. A pipe that its reader closed ends quietly."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    err.print(f"[bold red]Error:[/] {escape(_sentence(error))}", soft_wrap=True, highlight=False)
    raise SystemExit(1)


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get(error.name or "", "train")
        return f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[{extra}]'"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        remedy = REMEDIES.get(error.errno, "Choose another place.")
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}. {remedy}"
    return " ".join(str(error).split()) or type(error).__name__
