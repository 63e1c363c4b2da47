"""Conversions of damaged input: one sentence, a non-zero exit status, and nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llm2slm
from tests.support.commands import widen_terminal
from tests.support.conversions import DAMAGES, full_disk, write_sources


# peft asks for the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Each conversion: what it reads, the damages that are none to it, and its command line.
# An LLM's own config is not read again, and of its tensors the largest is one of the decoder, which is not needed.
NO_CONFIG = {"other type", "no config", "config no JSON"}
CONVERSIONS = {
    "build llm": ("llm", set(), ["build", "--llm", "llm", "--slm", "slm"]),
    "build slm": ("slm", set(), ["build", "--llm", "llm", "--slm", "slm"]),
    "lean": ("full", set(), ["lean", "full"]),
    "lean without LLM": ("llm", NO_CONFIG | {"missing tensor"}, ["lean", "full"]),
    "full": ("lean", set(), ["full", "lean"]),
    "full without LLM": ("llm", NO_CONFIG | {"missing tensor"}, ["full", "lean"]),
    "merge": ("adapter", NO_CONFIG, ["merge", "adapter"]),
    "merge into base": ("full", set(), ["merge", "adapter"]),
    "split": ("full", set(), ["split", "full"]),
    "import": ("two", set(), ["import", "two"]),
    "import projector": ("llava", NO_CONFIG, ["import", "llava/model.safetensors"]),
    "import into": ("full", set(), ["import", "llava/model.safetensors"]),
}
CASES = [
    (conversion, damage)
    for conversion, (_, harmless, _) in CONVERSIONS.items()
    for damage in DAMAGES
    if damage not in harmless
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def copy(sources, tmp_path, monkeypatch) -> Path:
    folder = Path(shutil.copytree(sources, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    widen_terminal(monkeypatch)
    return folder


def convert(conversion: str) -> int:
    words = [*CONVERSIONS[conversion][2], "output"]
    if words[0] == "merge":
        words += ["--base", "full"]
    elif words[1].startswith("llava"):
        words += ["--into", "full"]
    try:
        llm2slm.main(words if words[0] == "build" else ["convert", *words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check_refusal(status: int, error: str, folder: Path, before: set[Path]) -> None:
    # Progress, and where the LLM of a lean source is read, are no error.
    notes = ("Conversion ...", "Loading", "Writing", "lean is a lean checkpoint")
    lines = [line for line in error.splitlines() if line.strip() and "it/s" not in line and not line.startswith(notes)]
    assert status == 1, error
    assert len(lines) == 1, error
    assert lines[0].startswith("Error: ")
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize(("conversion", "damage"), CASES)
def test_damaged_input_is_refused(conversion, damage, copy, capfd):
    DAMAGES[damage](copy / CONVERSIONS[conversion][0])
    before = set(copy.rglob("*"))
    status = convert(conversion)
    check_refusal(status, capfd.readouterr().err, copy, before)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_full_disk_leaves_no_files(conversion, copy, capfd):
    before = set(copy.rglob("*"))
    with full_disk():
        status = convert(conversion)
    check_refusal(status, capfd.readouterr().err, copy, before)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_existing_files_are_replaced_only_on_request(conversion, copy, capfd):
    (copy / "output").mkdir()
    (copy / "output" / "mine").touch()
    before = set(copy.rglob("*"))
    status = convert(conversion)
    error = capfd.readouterr().err
    check_refusal(status, error, copy, before)
    assert "add --overwrite" in error
