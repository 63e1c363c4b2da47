"""
One rule for every output: what exists stays unless it is to be overwritten, an input always stays, and one run at a
time writes to a place. The next run in a place removes what a killed one left unfinished.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .atomic import is_stream, remove_unfinished


logger = logging.getLogger(__name__)

# Files that make a folder a model, which only a new model replaces.
MODEL_FILES = re.compile(
    r"(.*config|config_.*|tokenizer|special_tokens_map|vocab|store|export|training|recipe)\.json|merges\.txt"
    r"|.*\.(safetensors|safetensors\.index\.json|bin|model|py|xml|onnx|onnx\.data|pt2)"
)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def claimed(
    output: str | os.PathLike,
    *,
    folder: bool = False,
    overwrite: bool = False,
    inputs: Iterable[Any] = (),
    rank: int = 0,
) -> Iterator[None]:
    """
    Check that an output may be written, and keep other runs away from it: [`check_output`] inside [`locked`].

    Args:
        output: The file, or the folder.
        folder: It is a folder.
        overwrite: Replace what exists.
        inputs: Files and folders that are read, and that the output must not replace. Names that are none are ignored.
        rank: Number of this process, if several share the work: the first one checks what exists.
    """
    check_output(output, folder=folder, overwrite=overwrite or rank > 0, inputs=inputs)
    with locked(output, rank):
        check_output(output, folder=folder, overwrite=overwrite or rank > 0)  # another run may have ended meanwhile
        yield


def check_output(
    output: str | os.PathLike, *, folder: bool = False, overwrite: bool = False, inputs: Iterable[Any] = ()
) -> None:
    """
    Raise an error, before any work, for an output that may not or cannot be written. See [`claimed`].

    Raises:
        FileExistsError: If it exists, and is neither an empty folder, a device nor a pipe, unless `overwrite` is set.
        OSError: If it is a folder where a file is needed, or the other way round, or if a file cannot be created.
        ValueError: If it is an input, or holds one.
    """
    output = Path(output)
    if is_stream(output) and not folder:
        return
    is_folder = output.is_dir()
    if is_folder and not folder:
        raise IsADirectoryError(
            f"{output} cannot be written: it is a folder. Choose another output, or free some disk space."
        )
    if folder and output.exists() and not is_folder:
        raise NotADirectoryError(f"{output} is not a folder, and is not replaced by one. Choose another folder.")
    if not overwrite and is_folder and any(path.name != f".{output.name}.lock" for path in output.iterdir()):
        raise FileExistsError(f"{output} is not empty. Choose another folder, or add --overwrite (`overwrite=True`).")
    if not overwrite and not folder and output.exists():
        raise FileExistsError(f"{output} exists. Choose another file, or add --overwrite (`overwrite=True`).")
    check_not_input(output, inputs)
    if not folder:
        _check_writable(output)


def check_not_input(output: str | os.PathLike, inputs: Iterable[Any]) -> None:
    """Raise `ValueError` if an output is one of the inputs, under whichever name, or would replace one of them."""
    if not os.path.exists(output):
        return
    place = Path(os.path.realpath(output))
    for source in inputs:
        path = Path(source or "").expanduser()
        if not source or not os.path.exists(path):
            continue
        real = Path(os.path.realpath(path))
        is_part = place.is_relative_to(real) and place.is_file() and MODEL_FILES.fullmatch(place.name) is not None
        if os.path.samefile(path, output) or real.is_relative_to(place) or is_part:
            raise ValueError(f"{output} would replace {source}, which is read. Choose another output.")


def _check_writable(output: Path) -> None:
    existing = next(parent for parent in output.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
        with suppress(FileNotFoundError):
            os.stat(existing / f".{8 * '0'}.{output.name}")  # as an atomic write names it: this may be too long
    except OSError as error:
        raise OSError(
            f"{output} cannot be written: {error.strerror or error}. Choose another output, or free some disk space."
        ) from error


@contextmanager
def locked(output: str | os.PathLike, rank: int = 0) -> Iterator[None]:
    """
    Keep other runs away from an output, and remove what a killed one left unfinished next to it or in it.

    The lock is a hidden file next to the output, or in it where the folder around it is read-only. The system releases
    it when the process ends, however that happens; where the file system has no locks, a file with the number of the
    process takes its place.

    Args:
        output: A file or a folder. Devices and pipes are not locked.
        rank: Number of this process, if several share the work of one run.

    Raises:
        BlockingIOError: If another run writes to the output; with its process, if that is known.
    """
    output = Path(output)
    if is_stream(output):
        yield
        return
    with ExitStack() as stack:
        file = _lock_file(output, rank, stack)
        lock = _acquire(file, output)
        try:
            if os.environ.get("WORLD_SIZE", "1") == "1":  # another process of this run may be writing
                _clean(output)
            yield
        finally:
            with suppress(OSError):
                file.unlink()
            lock.release()


def _lock_file(output: Path, rank: int, stack: ExitStack) -> Path:
    """Return the path of a lock, in a folder that exists; folders made for it are removed if they stay empty."""
    place = Path(os.path.realpath(output))
    name = f".{place.name}.{rank}.lock" if rank else f".{place.name}.lock"
    for folder in reversed([parent for parent in place.parents if not parent.exists()]):
        with suppress(FileExistsError):
            folder.mkdir()
            stack.callback(_remove_empty, folder)
    return (place.parent if os.access(place.parent, os.W_OK) or not place.is_dir() else place) / name


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _acquire(file: Path, output: Path) -> BaseFileLock:
    holder = _holder(file)  # some versions of filelock empty the file
    for kind in (FileLock, SoftFileLock):
        lock = kind(file)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if kind is SoftFileLock and _is_gone(holder):
                file.unlink(missing_ok=True)
                return _acquire(file, output)
            process = f" (process {holder[0]} on {holder[1]})" if holder else ""
            raise BlockingIOError(
                f"{output} is being written by another run{process}. Wait for it, or choose another output."
            ) from error
        except NotImplementedError:  # no locks in this file system
            continue
        except OSError as error:
            if error.errno in NO_LOCKS and kind is FileLock:
                continue
            error.filename = str(output)
            raise
        _write_holder(file)
        return lock
    raise AssertionError("a soft lock needs nothing of the file system")


def _write_holder(file: Path) -> None:
    with suppress(OSError), file.open("r+", encoding="utf-8") as content:
        if not content.read(1):  # a soft lock has its own content
            content.write(f"{os.getpid()}\n{socket.gethostname()}\n")


def _holder(file: Path) -> tuple[int, str] | None:
    """Return number and host of the process that holds a lock, or `None`."""
    try:
        number, host, *_ = file.read_text(encoding="utf-8").split("\n")
        return int(number), host
    except (OSError, ValueError):
        return None


def _is_gone(holder: tuple[int, str] | None) -> bool:
    if holder is None or holder[1] != socket.gethostname():
        return False
    try:
        os.kill(holder[0], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _clean(output: Path) -> None:
    left = [*remove_unfinished(output), *(remove_unfinished(output / "*") if output.is_dir() else ())]
    if left:
        logger.warning(f"{output}: removed what an earlier run left unfinished ({', '.join(left)}).")
