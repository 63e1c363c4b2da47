"""Errors of the operating system name the path, the cause and the fix."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from modeling_llm2slm.data.causes import REMEDIES, no_file, sentence_of, unreadable_file


@pytest.mark.parametrize("number", REMEDIES)
def test_every_cause_has_a_fix(number: int) -> None:
    sentence = sentence_of(OSError(number, os.strerror(number), "some/file"))
    assert sentence == f"some/file: {os.strerror(number).lower()}. {REMEDIES[number]}"
    assert REMEDIES[number].endswith(".")


def test_an_error_without_a_path_is_about_the_place_or_has_no_sentence() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert sentence_of(full, "Standard output") == (
        "Standard output: no space left on device. Free some space, or choose another disk."
    )
    assert sentence_of(full) is None
    assert sentence_of(OSError("a sentence of its own"), "x") is None
    assert sentence_of(OSError(errno.ENOSR, "Strange", b"a/b")) == "a/b: strange. Choose another place."


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert str(no_file(tmp_path)) == f"{tmp_path} is a folder, but a file is needed. Check the path."
    assert str(no_file(tmp_path / "pipe", "data file")).startswith(
        f"{tmp_path / 'pipe'} is a pipe or a device, but a data"
    )
    assert str(no_file("/dev/null")).endswith("Copy its content to a file first.")
    assert str(no_file("no.txt")) == "There is no file no.txt."
    assert unreadable_file(tmp_path) == str(no_file(tmp_path / "pipe"))  # opening it would never end


def test_the_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    assert unreadable_file(tmp_path) is None
    assert unreadable_file(tmp_path / "none") == f"{tmp_path / 'none'}: no such file or directory. Check the path."
    (tmp_path / "a.safetensors").symlink_to("gone")
    assert unreadable_file(tmp_path) == f"{tmp_path / 'a.safetensors'}: no such file or directory. Check the path."

    def denied(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    expected = f"{tmp_path / 'config.json'}: permission denied. Change its permissions, or choose another place."
    assert unreadable_file(tmp_path / "config.json") == expected
