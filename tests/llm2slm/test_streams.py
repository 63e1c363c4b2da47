"""Standard streams: full, closed, in another locale; what is shown with --quiet; what follows an interruption."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm2slm
from llm2slm import output
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import PROMPTS, write_pairs
from tests.support.commands import ROOT, run


FULL = "Error: Standard output: no space left on device. Free some space, or choose another disk.\n"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `llm2slm` is the command."""
    variables = {**os.environ, "COLUMNS": "200", "PY": sys.executable, **environment}
    define = 'llm2slm() { "$PY" -m llm2slm "$@"; }'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {define}; {line}"], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=240, check=False, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.parametrize("words", ["--version", "train --help"])
def test_a_full_disk_behind_standard_output_is_one_sentence(words: str) -> None:
    result = shell(f"llm2slm {words} > /dev/full")
    assert (result.returncode, result.stderr) == (1, FULL)


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("llm2slm --version >&-", 1, "Error: Standard output: bad file descriptor. It is closed"),
        ("llm2slm --version 2>&-", 0, ""),
        ("llm2slm --version >&- 2>&-", 1, ""),
        ("llm2slm --version >&- 2> /dev/full", 1, ""),
        ("llm2slm train --help | head -n 1", None, ""),
    ],
)
def test_a_closed_stream_makes_no_noise(line: str, status: int | None, error: str) -> None:
    result = shell(line)
    assert result.stderr.startswith(error)
    assert len(result.stderr.splitlines()) == bool(error)
    assert status is None or result.returncode == status


@pytest.mark.slow
def test_generating_to_streams_that_fail_or_in_other_locales(composite: str, tmp_path: Path) -> None:
    generate = f"llm2slm generate {composite} --max-new-tokens 40"
    result = shell(f"{generate} src1 > /dev/full")
    assert (result.returncode, result.stderr) == (1, FULL)
    result = shell(f"{generate} <&-")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: Standard input: bad file descriptor.")
    expected = shell(f"{generate} 'src1 é'")
    assert expected.returncode == 0
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "cp1252"}):
        for line in (
            f"{generate} 'src1 é'",
            f"printf 'src1 é' | {generate}",
            f"printf '\\xef\\xbb\\xbfsrc1 é\\r\\n' | {generate}",
        ):
            assert shell(line, **locale).stdout == expected.stdout
    result = shell(f"{generate} $'src1 \\xff'")
    assert result.stderr == "Error: Prompt 1 is not UTF-8 (byte 0xff). Give the text in UTF-8.\n"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that puts bytes on standard input."""

    def put(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    return put


def test_lines_of_standard_input_end_at_a_line_feed(
    encoded: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr("llm2slm.generate._load", lambda *_: None)
    monkeypatch.setattr("llm2slm.generate._stream", lambda _, prompts, options: read.extend(prompts))
    encoded("\ufeffa\rb\r\nc\x85\u2028\x0b\x0c\nd".encode())
    assert run("generate", "model") == 0
    assert read == ["a\rb", "c\x85\u2028\x0b\x0c", "d"]
    for wrong, message in (
        (b"a\nb\xff", "Standard input, line 2 is not UTF-8 (byte 0xff)"),
        (b"\0", "Standard input, line 1 holds a NUL"),
    ):
        encoded(wrong)
        assert run("generate", "model") == 1
        assert message in capsys.readouterr().err


@pytest.fixture
def loud() -> Iterator[None]:
    """What other tests need after a test of --quiet."""
    yield
    output.set_quiet(False)


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("place", [0, 1, 3])
def test_quiet_leaves_errors_and_results(composite: str, tmp_path: Path, place: int, capsys: Any) -> None:
    words = ["generate", composite, "--file", tmp_path / "prompts.txt", "--output", tmp_path / "outputs.txt"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words[place:place] = ["--quiet"]
    assert run(*words, "--max-new-tokens", 2) == 0
    printed = capsys.readouterr()
    assert "outputs are in" in printed.out
    assert printed.err == ""
    assert run(*words) == 1
    assert capsys.readouterr().err.startswith("Error: ")
    assert run("--version") == 0
    assert not output.is_quiet()


@pytest.mark.usefixtures("loud")
def test_quiet_shows_no_progress_of_a_training(recipe: Path, capsys: Any) -> None:
    assert run("train", recipe, "--max-steps", 1, "--quiet") == 0
    printed = capsys.readouterr()
    assert "Trained 1 step" in printed.out
    assert printed.err == ""


def test_quiet_is_a_prompt_after_two_dashes() -> None:
    assert llm2slm._with_quiet_first(["generate", "m", "--", "--quiet"]) == ["generate", "m", "--", "--quiet"]
    assert llm2slm._with_quiet_first(["generate", "--quiet", "--", "-x"]) == ["--quiet", "generate", "--", "-x"]


def test_an_interruption_says_what_the_next_run_does(
    composite: str, recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    data = write_pairs(tmp_path / "data.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(TextToText, "from_pretrained", interrupt)
        for words, message in (
            (("evaluate", composite, data), "Interrupted. Repeat the command to start again."),
            (("generate", composite, "src1"), "Interrupted. Repeat the command to start again."),
            (
                ("generate", composite, "--file", data, "--output", tmp_path / "out.txt"),
                "Interrupted. Repeat the command to resume.",
            ),
        ):
            assert run(*words) == 130
            assert capsys.readouterr().err == f"{message}\n"
    monkeypatch.setattr("modeling_llm2slm.training.run._train", interrupt)
    monkeypatch.setattr("modeling_llm2slm.training.run.progress_lines", lambda *_: None)
    for words, message in (
        ((), "Interrupted. Repeat the command to resume. It starts from the beginning, as no checkpoint was written."),
        (("--resume", "false"), "Interrupted. To resume, set resume: true: the same command trains from scratch."),
    ):
        assert run("train", recipe, *words) == 130
        assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "no/model", "a prompt", "--output", "FILE"),
        ("generate", "no/model", "--file", "DATA", "--output", "FILE"),
        ("generate", "no/model", "--file", "DATA", "--output", "DATA"),
        ("evaluate", "no/model", "DATA", "--output", "FILE"),
        ("plan", "--llm", "no/model", "--data", "DATA", "--output", "FILE"),
        ("distill", "no/model", "DATA", "--output", "FILE"),
        ("encode", "no/model", "DATA", "--output", "FOLDER"),
        ("encode", "no/model", "DATA", "--output", "FILE"),
        ("speedup", "--llm", "no/model", "--prompts", "DATA", "--output", "FOLDER"),
        ("speedup", "--llm", "no/model", "--prompts", "DATA", "--output", "FILE"),
        ("build", "FOLDER", "--llm", "no/model"),
        ("build", "FILE", "--llm", "no/model", "--overwrite"),
        ("export", "no/model", "FOLDER"),
        ("convert", "lean", "no/model", "FOLDER"),
        ("convert", "full", "no/model", "FOLDER"),
        ("convert", "merge", "no/model", "FOLDER"),
        ("convert", "split", "no/model", "FOLDER"),
        ("convert", "split", "no/model", "FILE", "--overwrite"),
        ("convert", "import", "no/model", "FOLDER"),
        ("benchmark", "--output", "FOLDER"),
        ("benchmark", "--output", "NEW", "--work", "FILE"),
        ("benchmark", "--output", "NEW", "--work", "NEW", "--plots", "FOLDER"),
    ],
)
def test_no_command_replaces_what_exists(words: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    places = {name: tmp_path / name.lower() for name in ("FOLDER", "NEW")}
    places |= {"FILE": tmp_path / "file.jsonl", "DATA": tmp_path / "data.jsonl"}
    write_pairs(places["DATA"])
    places["FILE"].write_text("mine")
    places["FOLDER"].mkdir()
    for name in ("config.json", "time.svg"):
        (places["FOLDER"] / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*(places.get(word, word) for word in words)) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert any(str(places[word]) in error for word in words if word in places)
    assert "cannot be loaded" not in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
