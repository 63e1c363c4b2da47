"""The machine of a benchmark: its name, memory, bandwidth, and other load."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from time import perf_counter
from typing import Any

import psutil
import torch

from ..data.records import versions
from ..evaluation.timing import seconds_of
from ..files_llm2slm import first_line
from ..inference.engine import is_installed
from .contestants import contestants


BUSY = 0.15  # processors that others may keep busy before a cell counts as disturbed


def device_name(device: str) -> str:
    """Return the name of a device; `ValueError` if it does not exist."""
    try:
        torch.empty(0, device=device)
        if device.startswith("cuda"):
            return torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:  # no such name; torch built without it
        raise ValueError(f"{device} cannot be used ({first_line(error)}). Choose another --device.") from error
    return f"{device} {torch.backends.cpu.get_cpu_capability()}"


def engine_versions() -> dict[str, str]:
    """Return the versions of everything that a timing depends on, the packages of all contestants included."""
    packages = {package for contestant in contestants().values() for package in contestant.packages}
    return versions() | {package: version(package) for package in sorted(packages) if is_installed(package)}


def bandwidth(size: int, device: str) -> float:
    """Return the bytes per second at which a buffer of `size` bytes is read: the best of several passes."""
    buffer = torch.ones(math.ceil(size / 4), device=device)
    return buffer.nbytes / min(seconds_of(lambda: float(buffer.sum())) for _ in range(7))


@contextmanager
def disturbance() -> Iterator[dict[str, Any]]:
    """Measure how many processors other processes keep busy during the block, and whether that is too many."""
    found: dict[str, Any] = {}
    own, start = psutil.Process(), perf_counter()

    def busy() -> float:
        times = psutil.cpu_times()
        mine = own.cpu_times()
        # The time of guests is part of `user` already.
        return times.user + times.system + getattr(times, "nice", 0.0) - mine.user - mine.system

    before = busy()
    yield found
    others = max(busy() - before, 0.0) / (perf_counter() - start)
    found.update(others_busy=others, load_average=list(os.getloadavg()), noisy=others > BUSY)
