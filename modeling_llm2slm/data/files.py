"""Atomic writes of files and folders, among them checkpoints."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..files_llm2slm import first_line


WEIGHT_NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# What `llm2slm export` writes: graphs, their tables, and the list of them.
EXPORT_NAMES = re.compile(
    r"export\.json|embeddings\.safetensors|(openvino_)?(prompt|cross|step)\.(xml|bin|onnx|onnx\.data)"
)
HEX = "[0-9a-f]" * 8


@contextmanager
def atomic_write(path: str | os.PathLike, keep: bool = True) -> Iterator[Path]:
    """
    Yield a temporary path next to `path` to write a file or a folder to, and move it to `path` at the end.

    If the body raises or the process dies, `path` is unchanged. A folder that exists is exchanged in one step. It
    keeps the files that were not written, but not weights and graphs of an earlier model where new weights are
    written, as they would be loaded instead. A folder that receives neither weights nor graphs, or is the current
    directory, stays the same folder, and its files are replaced one by one.

    Args:
        path: The file or folder. An `OSError` of the body names it, also if a full disk has no name.
        keep: Whether a folder keeps the files that were not written.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # as deep as `path`: relative paths stay true
    with _named(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        for replaced in path.parent.glob(f".{HEX}.old.{glob.escape(path.name)}"):  # by a process that was killed
            _take_over(replaced, path) if path.exists() else replaced.rename(path)
        try:
            yield temporary
            if temporary.is_dir() and path.is_dir():
                _replace_folder(temporary, path, keep)
            else:
                temporary.replace(path)
        finally:
            _remove(temporary)


def check_replaceable(path: Path) -> None:
    """Raise `PermissionError` for a folder that cannot be replaced: a mount point, or one in a read-only folder."""
    path = Path(os.path.realpath(path))
    if path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK)):
        why = "it is a mount point" if os.path.ismount(path) else f"{path.parent} is not writable"
        raise PermissionError(
            f"{path} cannot be replaced in one step: {why}. Choose a folder in it, such as {path / 'model'}."
        )


def remove_unfinished(path: Path) -> None:
    """Remove what a killed [`atomic_write`] left. A `*` in the name of `path` stands for any text."""
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f".{HEX}.{glob.escape(path.name).replace('[*]', '*')}"):
        _remove(left)


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
    """Put the entries of `new` in place of those of `old`."""
    names = os.listdir(new)
    holds_model = any(WEIGHT_NAMES.fullmatch(name) or EXPORT_NAMES.fullmatch(name) for name in names)
    if (keep and not holds_model) or Path.cwd().is_relative_to(old):  # a shell in it would be left in a removed folder
        for name in sorted(names, key=lambda name: name == "config.json"):
            if (old / name).is_dir():
                _remove(old / name)
            (new / name).replace(old / name)
        for name in _stale(old, set(names)):
            _remove(old / name)
        return
    shutil.copymode(old, new)
    replaced = old.with_name(f".{uuid.uuid4().hex[:8]}.old.{old.name}")
    if _exchange(new, old):
        new.rename(replaced)
    else:  # two renames: a crash between them leaves the earlier folder whole, and the next write puts it back
        old.rename(replaced)
        new.rename(old)
    if keep:
        _take_over(replaced, old)
    _remove(replaced)


def _take_over(replaced: Path, path: Path) -> None:
    """Move to `path` what it lacks of the folder that it replaced, and remove the rest."""
    stale = _stale(replaced, set(os.listdir(path)))
    for entry in list(replaced.iterdir()):
        if entry.name not in stale and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    _remove(replaced)


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
