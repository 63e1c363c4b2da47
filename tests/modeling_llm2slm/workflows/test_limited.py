"""Functions in a child process: results, errors, progress, and what happens without enough memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from modeling_llm2slm.data.resources import free_memory
from modeling_llm2slm.workflows import limited
from modeling_llm2slm.workflows.limited import MemoryLimitError, is_out_of_memory, run_limited
from tests.support.quick_start import start_quickly


LIMIT = 200_000_000
Progress = Callable[[str], None]


def allocate(size: int, progress: Progress) -> tuple[int, bool]:
    progress("allocating")
    return len(torch.ones(size, dtype=torch.uint8)), free_memory() < 2 * LIMIT


def fail(error: Exception, progress: Progress) -> None:
    raise error


def die(number: int, progress: Progress) -> None:
    os.kill(os.getpid(), number)


class OwnError(Exception):
    def __init__(self, first: int, second: int):
        super().__init__(f"{first} and {second}")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    start_quickly(monkeypatch, limited)


def test_a_function_returns_its_result_and_what_it_took() -> None:
    steps: list[str] = []
    (result, has_limit), used = run_limited(partial(allocate, 100_000_000), LIMIT, steps.append)
    assert result == 100_000_000
    assert has_limit == (sys.platform == "linux")
    assert 90_000_000 < used < LIMIT
    assert steps == ["allocating"]


@pytest.mark.usefixtures("quickly")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces the limit")
@pytest.mark.parametrize(
    "function",
    [
        partial(allocate, 300_000_000),
        partial(die, signal.SIGKILL),
        partial(die, signal.SIGABRT),
        partial(fail, MemoryError()),
    ],
    ids=["allocation", "killed", "aborted", "MemoryError"],
)
def test_too_little_memory_is_one_sentence(function: Callable[[Progress], None]) -> None:
    with pytest.raises(MemoryLimitError, match=r"needs more than 200\.0 MB of memory, the limit \(--memory\)"):
        run_limited(function, LIMIT)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("wrong"), ValueError),
        (FileNotFoundError("wrong"), FileNotFoundError),
        (KeyError("wrong"), RuntimeError),
    ],
)
def test_errors_arrive_as_they_are(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="wrong"):
        run_limited(partial(fail, error), LIMIT)


@pytest.mark.usefixtures("quickly")
def test_an_end_without_a_result_is_an_error() -> None:
    with pytest.raises(OSError, match="ended with status -15 and without a result"):
        run_limited(partial(die, signal.SIGTERM), LIMIT)


def test_messages_of_allocators_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
