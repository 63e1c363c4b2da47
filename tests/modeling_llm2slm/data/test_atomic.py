"""Atomic writes of files and folders: complete or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from modeling_llm2slm.data import atomic
from modeling_llm2slm.data.atomic import atomic_write


NEW_MODEL = {"config.json": "new", "model.safetensors": "new weights"}


def write_model(target: Path) -> None:
    """Write a model to a folder in one atomic write."""
    with atomic_write(target) as folder:
        folder.mkdir()
        for name, text in NEW_MODEL.items():
            (folder / name).write_text(text)


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "folder" / "result.json"
    with atomic_write(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["write", "open", "safetensors"])
def test_system_errors_name_the_target(kind, tmp_path):
    """They name neither the temporary path nor nothing."""
    target, number = tmp_path / "result", errno.ENOSPC
    raised: dict[str, Any] = {
        "write": lambda name: OSError(number, os.strerror(number)),
        "open": lambda name: OSError(number, os.strerror(number), name),
        "safetensors": lambda name: SafetensorError(f"Error while serializing: I/O error: full (os error {number})"),
    }
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(target) as temporary:
        raise raised[kind](str(temporary / "model"))
    assert (caught.value.errno, caught.value.filename) == (number, str(target))


def test_a_file_that_blocks_the_target_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(tmp_path / "file")), atomic_write(tmp_path / "file" / "result"):
        raise AssertionError("the body must not run")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(kind, tmp_path):
    target = tmp_path / "result"
    inner = target if kind == "file" else target / "config.json"
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("before")

    def fail() -> None:
        with atomic_write(target) as temporary:
            if kind == "folder":
                temporary.mkdir()
            (temporary if kind == "file" else temporary / "config.json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inner.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_keeps_files_that_are_not_written(exchange, weights, tmp_path, monkeypatch):
    if not exchange:  # a system without renameat2
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    target = tmp_path / "model"
    (target / "checkpoint-1").mkdir(parents=True)
    (target / "checkpoint-1" / "weights").write_text("kept")
    (target / "tokenizer").mkdir()
    (target / "tokenizer" / "old").touch()
    target.chmod(0o750)
    with atomic_write(target) as temporary:
        (temporary / "tokenizer").mkdir(parents=True)
        (temporary / "tokenizer" / "new").touch()
        for name in {"config.json", *(["model.safetensors"] if weights else [])}:
            (temporary / name).write_text("{}")
    written = {"config.json"} | ({"model.safetensors"} if weights else set())
    assert {path.name for path in target.iterdir()} == {"checkpoint-1", "tokenizer"} | written
    assert (target / "checkpoint-1" / "weights").read_text() == "kept"
    assert [path.name for path in (target / "tokenizer").iterdir()] == ["new"]
    assert target.stat().st_mode & 0o777 == 0o750
    assert list(tmp_path.iterdir()) == [target]


def test_weights_of_an_earlier_save_do_not_outlive_new_ones(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for name in ("model.safetensors", "notes.safetensors"):
        (target / name).touch()
    with atomic_write(target) as temporary:
        temporary.mkdir()
        for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
            (temporary / name).touch()
    names = {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.safetensors"}
    assert {path.name for path in target.iterdir()} == names


@pytest.mark.parametrize("graphs", [("openvino_step.xml", "openvino_step.bin"), ("step.onnx", "step.onnx.data")])
def test_an_exported_model_does_not_outlive_new_weights(graphs, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    exported, kept = {"export.json", "embeddings.safetensors", *graphs}, {"notes.onnx", "tokenizer.json"}
    for name in exported | kept:
        (target / name).touch()
    for written, left in (
        ("tokenizer.json", exported | kept),
        ("model.safetensors", kept | {"model.safetensors"}),
    ):
        with atomic_write(target) as temporary:
            temporary.mkdir()
            (temporary / written).touch()
        assert set(os.listdir(target)) == left


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    refused = pytest.raises(PermissionError, match=r"mounted cannot be replaced: .*is not writable.*mounted/model")
    with refused, atomic_write(tmp_path / "mounted"):
        raise AssertionError("the body must not run")
    with atomic_write(tmp_path / "mounted" / "model") as temporary:
        temporary.mkdir()


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_mounted_disk_keeps_its_files_until_the_copy_is_complete(is_complete, tmp_path, monkeypatch):
    target, before_copies = tmp_path / "model", []
    target.mkdir()
    for name in NEW_MODEL:
        (target / name).write_text("old")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)

    def copy(source: Path, place: Path) -> None:
        before_copies.append((source.name, (target / source.name).read_text()))
        if not is_complete and source.name == "config.json":
            place.write_text("ha")
            raise OSError("No space left on device")
        shutil.copy(source, place)

    monkeypatch.setattr(shutil, "move", copy)
    with nullcontext() if is_complete else pytest.raises(OSError, match="No space"):
        write_model(target)
    assert before_copies == [("model.safetensors", "old"), ("config.json", "old")]
    assert {path.name for path in target.iterdir()} == set(NEW_MODEL)
    assert (target / "config.json").read_text() == ("new" if is_complete else "old")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("why", ["current directory", "mount point", "bind mount of the same disk"])
def test_a_folder_that_cannot_be_exchanged_stays_the_same_folder(why, tmp_path, monkeypatch):
    target = tmp_path / "model"
    (target / "tokenizer").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "mine"):
        (target / name).write_text("old")
    rename = Path.rename

    def busy(self: Path, other: Path) -> Path:
        if self == target:
            raise OSError("Device or resource busy")
        return rename(self, other)

    if why == "current directory":
        monkeypatch.chdir(target)
    elif why == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    else:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", busy)
    inode = target.stat().st_ino
    with atomic_write(target) as temporary:
        (temporary / "tokenizer").mkdir(parents=True)
        (temporary / "tokenizer" / "new").touch()
        for name in ("config.json", "model.safetensors.index.json"):
            (temporary / name).write_text("new")
    kept = {"config.json", "mine", "model.safetensors.index.json", "tokenizer"}
    assert {path.name for path in target.iterdir()} == kept
    assert [path.name for path in (target / "tokenizer").iterdir()] == ["new"]
    assert (target / "config.json").read_text() == "new"
    assert (target / "mine").read_text() == "old"
    assert target.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_second_rename_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if other == target and ".old." not in self.name:
            raise OSError("Input/output error")
        return rename(self, other)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_model(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "old"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere" / "model")
    with atomic_write(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "config.json").touch()
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "elsewhere" / "model" / "config.json").exists()


@pytest.mark.parametrize("when", ["writing", "replacing", "replaced"])
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_stopped_process_leaves_the_earlier_folder_or_the_new_one_complete(how, when, tmp_path):
    target = tmp_path / "model"
    (target / "checkpoint-1").mkdir(parents=True)
    (target / "checkpoint-1" / "optimizer.pt").write_text("kept")
    before = {"config.json": "old", "model.safetensors": "old weights", "mine": "kept"}
    for name, text in before.items():
        (target / name).write_text(text)
    exchange = atomic._exchange

    def stop(*_: Any) -> bool:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt

    child = os.fork()
    if child == 0:
        try:
            if when == "replacing":
                atomic._exchange = stop
            elif when == "replaced":
                atomic._exchange = lambda *paths: exchange(*paths) and stop()
            with atomic_write(target) as folder:
                folder.mkdir()
                (folder / "model.safetensors").write_text("new weights")
                if when == "writing":
                    stop()
                (folder / "config.json").write_text("new")
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if how == "killed" else 1)
    contents = {path.name: path.read_text() for path in target.iterdir() if path.is_file()}
    assert contents == ({**before, **NEW_MODEL} if when == "replaced" else before)
    assert (target / "checkpoint-1" / "optimizer.pt").read_text() == "kept"
    if how == "interrupted":
        assert list(tmp_path.iterdir()) == [target]
