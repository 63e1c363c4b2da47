"""Options of commands: generated from settings classes, in one spelling that underscores may replace."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llm2slm.options import extra_options, load_module, normalize_name, with_settings
from modeling_llm2slm import settings as declared
from modeling_llm2slm.settings import BuildSettings, EncodeSettings, GenerateFileSettings
from tests.support.commands import run, run_in_new_process


app = typer.Typer(context_settings={"token_normalize_func": normalize_name})
seen: list[Any] = []


@app.command()
@with_settings
def sample(name: str, settings: GenerateFileSettings, extra: int = 1) -> None:
    """A command with settings between options of its own."""
    seen.append((name, settings, extra))


def call(*words: str) -> Any:
    """Run the command above; return its result, or the text of its error."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))
    return seen.pop() if result.exit_code == 0 else (result.exit_code, result.output)


def test_defaults_are_those_of_the_settings_class() -> None:
    assert call("a") == ("a", GenerateFileSettings(), 1)


def test_values_arrive_in_the_types_of_the_fields() -> None:
    words = ("--sample", "--temperature", "2", "--num-beams", "3", "--prompt-column", "q", "--extra", "4")
    name, settings, extra = call("a", *words)
    assert (settings.sample, settings.temperature, settings.num_beams, settings.prompt_column) == (True, 2.0, 3, "q")
    assert isinstance(settings.temperature, float)
    assert (name, extra) == ("a", 4)


@pytest.mark.parametrize(
    ("words", "expected"), [([], None), (["8"], 8), (["4", "8"], [4, 8])], ids=["default", "one", "several"]
)
def test_an_option_of_one_value_or_several_may_be_repeated(words: list[str], expected: Any) -> None:
    build = typer.Typer()

    @build.command()
    @with_settings
    def sample(settings: BuildSettings) -> None:
        seen.append(settings)

    result = CliRunner().invoke(build, [part for word in words for part in ("--encoder-layer", word)])
    assert result.exit_code == 0
    assert seen.pop().encoder_layer == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-beams", "0"], "0 is not in the range x>=1|greater than or equal to 1"),
        (["--quantize", "int3"], "int8"),
        (["--temperature", "1"], "temperature and top_p need sampling"),
        (["--sample", "--temperature", "0"], "greater than or equal to 0.001"),
        (["--num-beams", "1000000"], "num_beams is 1000000, but it must be at most 1024"),
        (["--overlap"], "No such option"),  # not on the command line
    ],
)
def test_values_out_of_bounds_are_usage_errors(words: list[str], message: str) -> None:
    status, text = call("a", *words)
    assert status == 2
    assert any(part in text for part in message.split("|"))


@pytest.mark.parametrize(
    "words", [["--num_beams", "3", "--prompt_column=q"], ["--num-beams", "3", "--prompt-column=q"]]
)
def test_underscores_are_accepted(words: list[str]) -> None:
    assert call("a", *words)[1] == GenerateFileSettings(num_beams=3, prompt_column="q")


def test_former_names_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    for former, name in (
        ("answer_column", "target-column"),
        ("answer-max-length", "target-max-length"),
        ("timed-answers", "timed-outputs"),
    ):
        assert normalize_name(former) == name
    assert run("evaluate", "no/model", "no.jsonl", "--answer-column", "x", "--timed_answers", "1") == 1
    assert "no/model cannot be loaded" in capsys.readouterr().err


def test_extra_options_are_names_and_values() -> None:
    words = ["--max-steps=1", "--output_dir", "x", "--disable-tqdm", "--answer-column", "y"]
    expected = {"max_steps": "1", "output_dir": "x", "disable_tqdm": "true", "target_column": "y"}
    assert dict(extra_options(words)) == expected
    with pytest.raises(typer.BadParameter, match="stray"):
        dict(extra_options(["stray"]))


def test_settings_are_those_of_the_package() -> None:
    assert load_module("modeling_llm2slm.settings") is declared
    code = (
        "import sys; from llm2slm.options import load_module; s = load_module('modeling_llm2slm.settings'); "
        "assert 'modeling_llm2slm' not in sys.modules; "
        "from modeling_llm2slm.settings import EncodeSettings; assert EncodeSettings is s.EncodeSettings"
    )
    assert run_in_new_process(code=code).returncode == 0


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="dtype is 'int3', but it must be one of: bfloat16, float16, float32"):
        EncodeSettings(dtype="int3")
