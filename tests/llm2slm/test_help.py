"""The help of every command: fast, complete, and with examples that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

import llm2slm
from tests.support.commands import run, run_in_new_process


HEAVY = "{'torch', 'transformers', 'datasets', 'numpy', 'modeling_llm2slm'}"


def walk(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands, below a group of commands, with their names."""
    for name, child in getattr(command, "commands", {}).items():
        yield (*names, name), child
        yield from walk(child, *names, name)


COMMANDS = dict(walk(typer.main.get_command(llm2slm.app)))
LEAVES = [names for names, command in COMMANDS.items() if not hasattr(command, "commands")]
EXAMPLES = [
    (names, example)
    for names in LEAVES
    for example in re.findall(r"`([^`]+)`", COMMANDS[names].help)
    if f"llm2slm {' '.join(names)} " in example and "..." not in example
]


def parse(words: list[str]) -> Any:
    """Parse the words of a command line without running the command."""
    command, context = typer.main.get_command(llm2slm.app), None
    while hasattr(command, "commands"):
        context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, words, parent=context)


def test_all_commands_are_found() -> None:
    assert {names[0] for names in COMMANDS} == {
        "build", "train", "encode", "distill", "plan", "speedup", "export", "benchmark", "generate", "serve",
        "evaluate", "info", "card", "convert",
    }  # fmt: skip
    assert {names[1] for names in COMMANDS if names[1:]} == {
        "lean", "full", "merge", "split", "import", "prune-vocabulary",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["", "train", "generate", "convert import"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"import sys, llm2slm; llm2slm.main({[*command.split(), '--help']})"
    code = f"import atexit; atexit.register(lambda: print('heavy:', sorted(set(sys.modules) & {HEAVY}))); {code}"
    result = run_in_new_process(code=code)
    assert result.returncode == 0
    assert "heavy: []" in result.stdout


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_has_a_help(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*names, "--help") == 0
    assert "--help" in capsys.readouterr().out


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    listed = capsys.readouterr().out
    assert all(names[0] in listed for names in COMMANDS)


def test_training_comes_first_in_the_help() -> None:
    first = [names[0] for names in COMMANDS if len(names) == 1]
    assert first[:4] == ["speedup", "train", "encode", "distill"]
    assert first[-5:] == ["build", "info", "card", "export", "convert"]


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_every_help_has_an_example(names: tuple[str, ...]) -> None:
    assert names in {command for command, _ in EXAMPLES}


@pytest.mark.parametrize(("names", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_every_example_parses(names: tuple[str, ...], example: str) -> None:
    words = shlex.split(example.split(" > ")[0])
    context = parse(words[words.index("llm2slm") + 1 :])
    assert context.command.name == names[-1]


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_options_are_in_kebab_case_and_explained(names: tuple[str, ...]) -> None:
    for parameter in COMMANDS[names].params:
        assert parameter.help, parameter.name
        assert not any("_" in option or "--no-" in option for option in parameter.opts), parameter.name


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
