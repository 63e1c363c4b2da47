"""Progress on standard error: bars on a terminal, elsewhere a line at least every 30 seconds."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from .output import err, is_quiet, print_note


if TYPE_CHECKING:
    from modeling_llm2slm.data.progress import RepeatedLine


INTERVAL = 30.0  # seconds between two lines
START_AFTER = 1.0  # seconds until the first line of a task that is not counted: a short one prints none


class Counter(Protocol):
    """Called with a task, the number of items that are done, and the number of all."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


@contextmanager
def counting(unit: str, **units: str) -> Iterator[Counter]:
    """
    Show how many items are done: `Encoding: 1,200 of 29,000 prompts, 45 prompts/s, 10 min left`.

    Args:
        unit: What is counted, in the plural.
        units: What some tasks count instead.
    """
    unit_of = defaultdict(lambda: unit, units)
    if _is_silent():
        yield lambda task, done, total: None
    elif err.is_terminal:
        bars = _Bars(unit_of)
        try:
            yield bars.count
        finally:
            bars.stop()
    else:
        with _repeated() as lines:
            yield _CountedLines(unit_of, lines).count


@contextmanager
def steps(task: str) -> Iterator[Callable[[str], None]]:
    """Show the step that a task is at, for tasks that cannot be counted: `Planning: timing the LLM (2 min)`."""
    if _is_silent():
        yield lambda step: None
    elif err.is_terminal:
        with err.status(task) as status:
            yield lambda step: status.update(f"{task}: {step}")
    else:
        start = time.monotonic()
        with _repeated(START_AFTER) as lines:
            lines.update(lambda: f"{task} ...")
            yield lambda step: lines.update(lambda: f"{task}: {step} ({duration(time.monotonic() - start)})")
        if lines.are_written:
            print_note(f"{task}: done in {duration(time.monotonic() - start)}")


def duration(seconds: float) -> str:
    """Return a time in its largest unit: `40 s`, `10 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _is_silent() -> bool:
    return is_quiet() or os.environ.get("RANK", "0") != "0"  # of the processes of torchrun, the first one reports


class _Bars:
    """Progress bars, which appear with the first item that is counted."""

    def __init__(self, unit_of: Mapping[str, str]):
        self._unit_of = unit_of
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def count(self, task: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = self._start()
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, unit=self._unit_of[task])
        self._bars.update(self._tasks[task], completed=done, total=total, visible=done < total)

    def _start(self) -> Any:
        from rich import progress

        texts = progress.TextColumn("{task.description}"), progress.TextColumn("{task.fields[unit]}")
        times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
        columns = (texts[0], progress.BarColumn(), progress.MofNCompleteColumn(), texts[1], *times)
        bars = progress.Progress(*columns, console=err, transient=True)
        bars.start()
        return bars

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()


def _repeated(start_after: float | None = None) -> RepeatedLine:
    from modeling_llm2slm.data.progress import RepeatedLine

    return RepeatedLine(print_note, INTERVAL, start_after)


class _CountedLines:
    """A line for each task at its start, at its end, and every [`INTERVAL`] between them."""

    def __init__(self, unit_of: Mapping[str, str], lines: RepeatedLine):
        self._unit_of = unit_of
        self._lines = lines
        self._begun: dict[str, tuple[float, int]] = {}  # time and count of the first call: a run may be resumed
        self._finished: set[str] = set()

    def count(self, task: str, done: int, total: int) -> None:
        if task in self._finished:
            return
        is_first, is_last = task not in self._begun, done >= total
        self._begun.setdefault(task, (time.monotonic(), done))
        if is_last:
            self._finished.add(task)
        self._lines.update(lambda: self._describe(task, done, total), now=is_first or is_last)

    def _describe(self, task: str, done: int, total: int) -> str:
        start, already = self._begun[task]
        seconds = time.monotonic() - start
        unit = self._unit_of[task]
        counts = f"{task}: {done:,} of {total:,} {unit}"
        if done >= total:
            return f"{counts}, {duration(seconds)}"
        if done == already or seconds <= 0:
            return counts
        rate = (done - already) / seconds
        return f"{counts}, {rate:,.3g} {unit}/s, {duration((total - done) / rate)} left"
