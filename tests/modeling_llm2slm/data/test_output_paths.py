"""What exists stays, an input always stays, and one run at a time writes to a place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest

from modeling_llm2slm.data import output_paths
from modeling_llm2slm.data.atomic import atomic_write
from modeling_llm2slm.data.output_paths import check_not_input, check_output, claimed, locked


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "metrics.json").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "to model").symlink_to("model")
    os.link(tmp_path / "file", tmp_path / "hard link")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("name", ["file", "link", "hard link", "model/config.json", "to model/config.json"])
def test_a_file_that_exists_stays(place: Path, name: str) -> None:
    with pytest.raises(FileExistsError, match=r"exists\. Choose another file, or add --overwrite"):
        check_output(place / name)
    check_output(place / name, overwrite=True)


@pytest.mark.parametrize("name", ["new", "new/folder/file", "model/new.json", "pipe", "/dev/null", "/dev/stdout"])
def test_what_can_be_written_is_accepted(place: Path, name: str) -> None:
    check_output(place / name, inputs=["no/such/file", "user/name", None, place / "file"])
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("model", False, "model cannot be written: it is a folder"),
        ("file/new", False, "file/new cannot be written: Not a directory"),
        ("x" * 250, False, "x cannot be written: File name too long"),
        ("file", True, "file is not a folder, and is not replaced by one"),
        ("pipe", True, "pipe is not a folder"),
        ("/dev/null", True, "/dev/null is not a folder"),
    ],
)
def test_what_can_never_be_written_is_refused_even_with_overwrite(
    place: Path, name: str, folder: bool, message: str
) -> None:
    with pytest.raises(OSError, match=message):
        check_output(place / name, folder=folder, overwrite=True)


def test_a_folder_that_is_not_empty_stays(place: Path) -> None:
    check_output(place / "empty", folder=True)
    with pytest.raises(FileExistsError, match=r"is not empty\. Choose another folder, or add --overwrite"):
        check_output(place / "model", folder=True)
    check_output(place / "model", folder=True, overwrite=True)


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("file", "file"),
        ("link", "file"),
        ("file", "link"),
        ("hard link", "file"),
        ("empty/../file", "file"),
        ("model", "to model"),
        ("to model", "model"),
        ("model", "model/metrics.json"),  # the folder would be replaced with the input in it
        ("model/config.json", "model"),  # a part of the model that is read
        ("to model/config.json", "model"),
    ],
)
def test_an_input_stays_under_every_name(place: Path, output: str, source: str) -> None:
    for name in (place / source, str(place / source)):
        with pytest.raises(ValueError, match=r"would replace .*, which is read\. Choose another output"):
            check_not_input(place / output, [None, "no/such", name])


@pytest.mark.parametrize(
    ("output", "source"), [("model/metrics.json", "model"), ("empty", "model"), ("model/new", "model")]
)
def test_results_inside_a_model_may_be_replaced(place: Path, output: str, source: str) -> None:
    check_not_input(place / output, [place / source])


def test_devices_and_pipes_are_written_to(place: Path) -> None:
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((place / "pipe").read_text()))
    reader.start()
    with claimed(place / "pipe"), atomic_write(place / "pipe") as temporary:
        temporary.write_text("text")
    reader.join()
    assert read == ["text"]
    assert (place / "pipe").is_fifo()
    with atomic_write("/dev/null") as temporary:
        temporary.write_text("text")
    with pytest.raises(OSError, match="No space left") as caught, atomic_write("/dev/full") as temporary:
        temporary.write_text("text")
    assert caught.value.filename == "/dev/full"
    with pytest.raises(NotADirectoryError), atomic_write("/dev/null") as temporary:
        temporary.mkdir()


def test_standard_output_may_be_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.stdout.write('before '); sys.stdout.flush()\n"
        "from modeling_llm2slm.data.atomic import atomic_write\n"
        "with atomic_write('/dev/stdout') as path: path.write_text('text')"
    )
    with (tmp_path / "file").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, timeout=120)
    assert (tmp_path / "file").read_text() == "before text"
    assert os.listdir(tmp_path) == ["file"]


@contextmanager
def held(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of an output in another process."""
    code = (
        "import sys; from modeling_llm2slm.data.output_paths import locked\n"
        "with locked(sys.argv[1]): print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(output)], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_until_the_first_one_ends_or_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with held(output) as process:
        (tmp_path / "link").symlink_to("new")
        for path in (output, tmp_path / "link" / "out"):
            with pytest.raises(
                BlockingIOError, match=rf"out is being written by another run \(process {process.pid} "
            ):
                locked(path).__enter__()
        process.kill()
        process.wait()
    assert (tmp_path / "new" / ".out.lock").exists()
    with locked(output):
        pass
    assert sorted(os.listdir(tmp_path)) == ["link", "new"]
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("missing", [OSError(38, "Function not implemented"), OSError(95, "x"), NotImplementedError()])
def test_a_file_system_without_locks_gets_a_file_with_the_process(
    missing: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lockless(filelock.FileLock):  # type: ignore[misc, valid-type]
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            raise missing

    monkeypatch.setattr(output_paths, "FileLock", Lockless)
    output, file = tmp_path / "out", tmp_path / ".out.lock"
    with locked(output):
        assert file.read_text().startswith(f"{os.getpid()}\n")
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on "):
            locked(output).__enter__()
    assert not file.exists()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file.write_text(f"{gone.pid}\n{socket.gethostname()}\n")
    with locked(output):
        pass
    file.write_text("1\nanother-host\n")
    with pytest.raises(BlockingIOError, match="process 1 on another-host"):
        locked(output).__enter__()


def test_processes_of_one_run_share_an_output(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), locked(tmp_path / "out", rank=1), pytest.raises(BlockingIOError):
        locked(tmp_path / "out", rank=1).__enter__()
    assert os.listdir(tmp_path) == []


def test_the_next_run_removes_what_a_killed_one_left_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    left = [tmp_path / ".0123abcd.out", output / ".0123abcd.config.json", output / ".0123abcd.model"]
    left.append(tmp_path / ".0123abcd..4567cdef.out")  # of a write inside the first one
    others = [tmp_path / ".0123abcd.other", tmp_path / ".0123.out", output / ".notes", output / "kept"]
    output.mkdir()
    for path in (*left, *others):
        path.mkdir()
    with locked(output):
        assert [path.exists() for path in (*left, *others)] == [False] * 4 + [True] * 4
    assert "out: removed what an earlier run left unfinished (.0123abcd..4567cdef.out, " in caplog.text


def test_a_folder_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    """A killed run may leave it so where the system cannot exchange two folders in one step."""
    earlier = tmp_path / ".0123abcd.old.out"
    earlier.mkdir()
    (earlier / "model").touch()
    with locked(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "model").exists()
    earlier.mkdir()
    with locked(tmp_path / "out"):
        assert not earlier.exists()
    assert os.listdir(tmp_path / "out") == ["model"]


@pytest.mark.parametrize("check", [lambda path: locked(path).__enter__(), check_output])
def test_a_place_that_cannot_be_written_is_named(check: Callable[[Path], Any]) -> None:
    with pytest.raises(OSError, match="/proc/outputs"):
        check(Path("/proc/outputs"))
