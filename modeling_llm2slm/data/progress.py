"""Lines of progress at regular intervals, for output that is not a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RepeatedLine:
    """
    Writes the newest of the lines that it is given, at least once per interval, also while none arrives. Use it as a
    context manager: a thread writes the lines inside.

    Args:
        write: Called with each line.
        interval: Seconds between two lines.
        start_after: Seconds until the first line. Default: `interval`.
    """

    def __init__(self, write: Callable[[str], None], interval: float, start_after: float | None = None):
        self.are_written = False
        self._write = write
        self._interval = interval
        self._line: Callable[[], str] | None = None
        self._next = time.monotonic() + (interval if start_after is None else start_after)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> RepeatedLine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def update(self, line: Callable[[], str], now: bool = False) -> None:
        """Replace the line; it is written at once if `now`, or if the last one was written long ago."""
        with self._lock:
            self._line = line
            self._write_if_due(now)

    def _repeat(self) -> None:
        while not self._stopped.wait(min(self._interval / 10, 0.5)):
            with self._lock:
                self._write_if_due()

    def _write_if_due(self, now: bool = False) -> None:
        if self._line is not None and (now or time.monotonic() >= self._next):
            self._write(self._line())
            self._next = time.monotonic() + self._interval
            self.are_written = True
