"""Disk space and memory: what is free, checked before work that needs more."""

from __future__ import annotations

import shutil
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
    """Return the bytes of memory that are free on this machine and within the limit of its container."""
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
    return free
