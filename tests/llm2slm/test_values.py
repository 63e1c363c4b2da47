"""Every option of every command takes a value, or refuses it in one sentence and without a traceback."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from llm2slm import app
from modeling_llm2slm.training.recipe import recipe_fields
from tests.support.commands import run
from tests.support.values import TEXTS


SECONDS = 10


def commands(group: Any, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The words and the command of each command in a group."""
    if not hasattr(group, "commands"):
        return [(words, group)]
    return [found for name, each in group.commands.items() for found in commands(each, (*words, name))]


COMMANDS = dict(commands(typer.main.get_command(app)))
# The options of typer. Those of recipes, which it shows but does not parse, are below.
OPTIONS = [
    (words, option.opts[-1])
    for words, command in COMMANDS.items()
    for option in command.params
    if option.param_type_name == "option" and not getattr(option, "is_flag", False)
]
FIELDS = [field.name for field in (*recipe_fields(), *recipe_fields(trainer=True))]


def arguments_of(words: tuple[str, ...]) -> list[str]:
    """All arguments of a command, and the options that it requires: models and files that do not exist."""
    params = [param for param in COMMANDS[words].params if param.expose_value]
    required = [param for param in params if param.required or param.param_type_name == "argument"]
    return [
        word
        for param in required
        for word in ([param.opts[-1]] if param.param_type_name == "option" else []) + ["no/such/one"]
    ]


def check(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    start = time.perf_counter()
    status = run(*words)
    errors = capsys.readouterr().err
    assert status in (0, 1, 2)
    assert time.perf_counter() - start < SECONDS
    assert "Traceback" not in errors
    assert status == 0 or errors.strip()
    assert len(errors) < 3000 + 2 * len(words[-1])


@pytest.mark.parametrize(
    ("words", "option"), OPTIONS, ids=lambda part: part if isinstance(part, str) else "-".join(part)
)
def test_every_option(
    words: tuple[str, ...],
    option: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in random.Random(f"{words}{option}").sample(TEXTS, 4):
        check(capsys, *words, *arguments_of(words), f"{option}={value}")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_recipe(
    field: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("model: no/such/one\ntrain_data: no.jsonl\noutput_dir: out\n")
    for value in random.Random(field).sample(TEXTS, 2):
        check(capsys, "train", "recipe.yaml", f"--{field}={value}")
