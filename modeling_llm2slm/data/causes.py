"""What the operating system says about a failure, as a sentence: the path, the cause, and the fix."""

from __future__ import annotations

import errno
import os
from pathlib import Path


SPACE = "Free some space, or choose another disk."
PERMISSIONS = "Change its permissions, or choose another place."
# What to do about an error of the operating system, by its number.
REMEDIES = {
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EROFS: "Choose another place.",
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or choose another disk.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of the path is a file: check the path.",
    errno.EISDIR: "A file is needed: check the path.",
    errno.EEXIST: "It is a file, but a folder is needed: choose another place.",
    errno.ENOTEMPTY: "Another program writes to it: choose another place.",
    errno.ELOOP: "Its symbolic links lead in a circle: check the path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "Close other programs: the system has no more open files.",
    errno.ENOMEM: "Close other programs, or use a machine with more memory.",
    errno.EIO: "The disk may be damaged: check it, or choose another one.",
    errno.ESTALE: "The network disk has changed: mount it again.",
    errno.EBADF: "It is closed: open it, or write to a file with --output.",
    errno.ENXIO: "Nothing reads from it: start its reader first.",
    errno.ETXTBSY: "A program runs from it: stop that program first.",
}


def sentence_of(error: OSError, place: str | None = None) -> str | None:
    """
    Return a sentence about an error of the operating system, or `None` for an error that has no number or no place.

    Args:
        error: The error.
        place: What failed, if the error names no path.
    """
    name = error.filename if error.filename is not None else place
    if error.errno is None or name is None:
        return None
    remedy = REMEDIES.get(error.errno, "Choose another place.")
    return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {_cause(error).lower()}. {remedy}"


def _cause(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or 0)


def no_file(path: str | os.PathLike, what: str = "file") -> OSError:
    """Return the error for a path that is not a regular file: reading a pipe may never end."""
    place = Path(path).expanduser()
    if place.is_dir():
        return IsADirectoryError(f"{path} is a folder, but a {what} is needed. Check the path.")
    if place.exists():
        return OSError(f"{path} is a pipe or a device, but a {what} is needed. Copy its content to a file first.")
    return FileNotFoundError(f"There is no {what} {path}.")


def unreadable_file(path: str | os.PathLike) -> str | None:
    """Return a sentence about the first file, at a path or in its folder, that the system cannot read, or `None`."""
    place = Path(path)
    try:
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            if file.exists() and not file.is_file() and not file.is_dir():
                return str(no_file(file))
            if not file.is_dir():
                with file.open("rb") as content:
                    content.read(1)
    except OSError as error:
        return sentence_of(error, str(path))
    return None
