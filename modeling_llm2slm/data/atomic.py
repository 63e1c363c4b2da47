"""Atomic writes of files and folders, among them checkpoints."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from ..files_llm2slm import first_line


WEIGHT_NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# What `llm2slm export` writes: graphs, their tables, and the list of them.
EXPORT_NAMES = re.compile(
    r"export\.json|embeddings\.safetensors|(openvino_)?(prompt|cross|first|step)\.(xml|bin|onnx|onnx\.data|pt2)"
)
HEX = "[0-9a-f]" * 8


@contextmanager
def atomic_write(path: str | os.PathLike, keep: bool = True) -> Iterator[Path]:
    """
    Yield a temporary path next to `path` to write a file or a folder to, and move it to `path` at the end.

    If the body raises or the process dies, `path` is unchanged. A device or a pipe is written to at the end. A folder
    that exists is exchanged in one step. It keeps the files that were not written, but not weights and graphs of an
    earlier model where new weights are written, as they would be loaded instead. A folder that receives neither
    weights nor graphs, is the current directory or is a mount point stays the same folder: its files are replaced one
    by one, `config.json` last.

    Args:
        path: The file or folder. An `OSError` of the body names it, also if a full disk has no name.
        keep: Whether a folder that is exchanged keeps the files that were not written.

    Raises:
        PermissionError: See [`check_replaceable`].
    """
    if is_stream(path):
        with _named(Path(path), Path(path)), _copied_to_stream(Path(path)) as temporary:
            yield temporary
        return
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # as deep as `path`: relative paths stay true
    with _named(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.is_dir() and path.is_dir():
                _replace_folder(temporary, path, keep)
            else:
                temporary.replace(path)
        finally:
            _remove(temporary)


def check_replaceable(path: str | os.PathLike) -> None:
    """Raise `PermissionError` for a folder in a read-only folder, as nothing can be written next to it."""
    path = Path(os.path.realpath(path))
    if path.is_dir() and not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"{path} cannot be replaced: a new version is written next to it, and {path.parent} is not writable. "
            f"Choose a folder in it, such as {path / 'model'}."
        )


def remove_unfinished(path: Path) -> list[str]:
    """
    Remove what a killed [`atomic_write`] left, and return the names. A `*` in the name of `path` stands for any text.

    A folder that was moved away to be replaced, while no other took its place, is put back.
    """
    path = Path(os.path.realpath(path))
    names = glob.escape(path.name).replace("[*]", "*")
    for earlier in path.parent.glob(f".{HEX}.old.{names}"):
        if not os.path.lexists(earlier.with_name(earlier.name.partition(".old.")[2])):
            earlier.rename(earlier.with_name(earlier.name.partition(".old.")[2]))
    nested = f".{HEX}.{names}"  # of a write to the temporary path of another one
    patterns = (names, f"old.{names}", nested, f"old.{nested}")
    removed = [left for pattern in patterns for left in path.parent.glob(f".{HEX}.{pattern}")]
    for left in removed:
        _remove(left)
    return sorted({left.name for left in removed})


def is_stream(path: str | os.PathLike) -> bool:
    """Return whether a path is a device, a pipe, a socket or an open file of a process: written to, never replaced."""
    if os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/")):
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def _copied_to_stream(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file, and copy it to a device or a pipe at the end."""
    with TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        yield temporary
        if temporary.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        with open(temporary, "rb") as content, open(path, "ab") as stream:  # standard output may be a file
            shutil.copyfileobj(content, stream)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Turn system errors about `temporary`, or about nothing that has a name, into `OSError`s about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).startswith(str(temporary))):
            error.filename = str(path)
        raise
    except SafetensorError as error:
        number = re.search(r"serializing.*\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(f"{path} could not be written: {first_line(error)}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _replace_folder(new: Path, old: Path, keep: bool) -> None:
    """Put the entries of `new` in place of those of `old`. Afterwards `new` holds nothing that is needed."""
    written = set(os.listdir(new))
    stale = _stale(old, written)
    holds_model = any(WEIGHT_NAMES.fullmatch(name) or EXPORT_NAMES.fullmatch(name) for name in written)
    in_place = (keep and not holds_model) or Path.cwd().is_relative_to(old)  # a shell there would lose its folder
    if not in_place and _exchange_folders(new, old, written | stale if keep else set(os.listdir(old))):
        return
    for name in sorted(written, key=lambda name: name == "config.json"):
        remove_unfinished(old / name)
        copied = old / f".{uuid.uuid4().hex[:8]}.{name}"
        try:
            shutil.move(new / name, copied)  # to a mounted disk, this copies: under another name until it is complete
            if (old / name).is_dir():
                _remove(old / name)
            copied.replace(old / name)
        finally:
            _remove(copied)
    for name in stale:
        _remove(old / name)


def _exchange_folders(new: Path, old: Path, replaced: set[str]) -> bool:
    """
    Put `new` in place of `old`, with the entries of `old` that are not `replaced`. Return `False`, with `old`
    unchanged, if `old` is a mount point.
    """
    if os.path.ismount(old) or new.stat().st_dev != old.stat().st_dev:
        return False
    for name in set(os.listdir(old)) - replaced:  # before the exchange, so that no moment has a folder without them
        _link(old / name, new / name)
    shutil.copymode(old, new)
    if _exchange(new, old):
        return True
    earlier = old.with_name(f".{uuid.uuid4().hex[:8]}.old.{old.name}")
    try:
        old.rename(earlier)
    except OSError:  # a folder of the same disk is mounted here
        return False
    try:
        new.rename(old)
    except BaseException:
        earlier.rename(old)
        raise
    _remove(earlier)
    return True


def _link(source: Path, target: Path) -> None:
    """Link a file, or all files of a folder."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _stale(folder: Path, written: set[str]) -> set[str]:
    """Return the names of weights and graphs in a folder that weights among the `written` files replace."""
    if not any(map(WEIGHT_NAMES.fullmatch, written)):
        return set()
    old = set(os.listdir(folder)) - written
    return {name for name in old if WEIGHT_NAMES.fullmatch(name) or EXPORT_NAMES.fullmatch(name)}


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step (Linux: `renameat2`). Return whether the system could."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
