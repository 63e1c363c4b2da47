"""The Space: what its front matter and its app say."""

import re
import runpy
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement

import llm2slm
from tests.test_packaging import declared


SPACE = Path(__file__).parents[2] / "examples" / "space"


def test_front_matter_names_the_app_and_a_gradio_that_the_package_allows() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (SPACE / front["app_file"]).is_file()
    assert front["sdk"] == "gradio"
    assert declared()["gradio"].specifier.contains(front["sdk_version"])
    assert {front["colorFrom"], front["colorTo"]} <= {
        "red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"
    }  # fmt: skip
    assert len(front["short_description"]) <= 60


def test_requirements_are_an_extra_of_the_package() -> None:
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (requirement,) = [Requirement(line) for line in lines if re.match(r"\w", line)]
    assert requirement.name == "modeling-llm2slm"
    assert requirement.extras == {"playground"}


def test_app_serves_the_page_of_the_named_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(llm2slm, "main", calls.append)
    monkeypatch.setenv("MODEL", "user/model")
    monkeypatch.setenv("LLM", "llm")
    (tmp_path / "examples.txt").write_text("A prompt.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(SPACE / "app.py"))["main"]()
    (arguments,) = calls
    command = typer.main.get_command(llm2slm.app)
    context = command.commands["serve"].make_context("serve", arguments[1:])  # type: ignore[attr-defined]
    wanted = {"model": "user/model", "llm": "llm", "examples": "examples.txt", "playground": True, "port": 7860}
    assert wanted.items() <= context.params.items()
