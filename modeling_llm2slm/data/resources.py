"""Disk space and memory: what is free, checked before work that needs more, and what was used."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import psutil
from rich.filesize import decimal


# Limit, use, and statistics of a control group, by which containers limit memory: version 2 and version 1.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def check_disk_space(
    path: str | Path, needed: int, purpose: str = "", fix: str = "Free disk space, or choose another disk."
) -> None:
    """
    Raise `OSError` if the disk of a file or folder, which may not exist yet, has too little space.

    Args:
        path: The file or folder.
        needed: Bytes that will be written.
        purpose: What they are for, for the error: ` for 34 tokens`.
        fix: The last sentence of the error.
    """
    absolute = Path(path).absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(f"{path} needs {decimal(needed)}{purpose}, but {decimal(free)} are free. {fix}")


def free_memory() -> int:
    """Return the bytes of memory that are free: on this machine, in its container and for this process."""
    free = psutil.virtual_memory().available
    for files in CONTROL_GROUPS:
        try:
            limit, used, statistics = (Path(file).read_text() for file in files)
        except OSError:
            continue
        if limit.strip().isdigit():
            counts = dict(line.split() for line in statistics.splitlines())
            cached = int(counts.get("inactive_file", 0))  # which the system frees when memory is needed
            free = min(free, max(int(limit) - int(used) + cached, 0))
    if sys.platform == "linux":
        import resource

        limit_of_process, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if limit_of_process != resource.RLIM_INFINITY:
            free = min(free, max(limit_of_process - private_memory(), 0))
    return free


def private_memory() -> int:
    """
    Return the bytes of memory that this process may write to and shares with none, as Linux counts them for
    `RLIMIT_DATA`: neither the code of libraries nor what is only reserved.
    """
    return _of_process("VmData")


def peak_memory() -> int:
    """Return the most bytes that this process has held, mapped files included."""
    if Path("/proc/self/status").is_file():  # elsewhere the peak of the parent process counts as well
        return _of_process("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _of_process(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{name}:")[1].split()[0])
