"""
The `llm2slm` command: one module for each group of commands.

A module that has a `typer.Typer` called `commands` is a group; adding such a module adds its commands. All of them are
imported for every `--help`, so they import torch, transformers and `modeling_llm2slm` inside their functions.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .options import normalize_name
from .output import StandardOutput, exit_with, prepare_streams, print_interruption, print_line, set_quiet


QUIET, RAY = "--quiet", "--ray"
# Modules whose commands come first in the help, in this order.
ORDER = ("train", "data", "generate", "evaluate", "checkpoints", "convert")


class Commands(TyperGroup):
    """The group of all commands: tells what the next run does after one is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            print_interruption(interrupt)
            raise


app = typer.Typer(
    name="llm2slm",
    cls=Commands,
    help="A large frozen language model reads the prompt once, and a small one generates the output.",
    epilog="Set LLM2SLM_DEBUG=1 to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"token_normalize_func": normalize_name},  # holds for all commands
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error becomes one sentence and a non-zero exit status."""
    words = _with_bare_ray(_with_quiet_first(sys.argv[1:] if arguments is None else arguments))
    set_quiet(words[:1] == [QUIET])
    prepare_streams()
    try:
        try:
            app(args=words, prog_name="llm2slm")
        finally:
            if isinstance(sys.stdout, StandardOutput):
                sys.stdout.flush()  # here, its error is one sentence
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("LLM2SLM_DEBUG"):
            raise
        exit_with(error)


def _with_quiet_first(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with `--quiet` before the command, wherever it stands."""
    end = words.index("--") if "--" in words else len(words)
    rest = [word for word in words[:end] if word != QUIET]
    return [*([QUIET] if len(rest) < end else []), *rest, *words[end:]]


def _with_bare_ray(words: list[str]) -> list[str]:
    """Return the words with an empty value for `--ray` where it has none: typer knows no optional values."""
    end = words.index("--") if "--" in words else len(words)
    is_bare = [
        word == RAY and (index + 1 == len(words) or words[index + 1].startswith("-"))
        for index, word in enumerate(words[:end])
    ]
    return [f"{RAY}=" if bare else word for word, bare in zip(words, is_bare + [False] * len(words), strict=False)]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_line(version("modeling-llm2slm"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option(QUIET, help="Show errors and results only: no progress, no warnings.")
    ] = False,
) -> None:
    pass  # `main` reads both


def _groups() -> Iterator[typer.Typer]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "__main__"]
    for name in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        group = getattr(import_module(f"{__name__}.{name}"), "commands", None)
        if group is not None:
            yield group


for _group in _groups():
    app.add_typer(_group)
