"""The pace of the server: how many tokens it generates in a second of work, as measured lately."""

from __future__ import annotations

import time


class Pace:
    """
    Measures tokens per second of work. Earlier work counts less and less, so that the pace follows the traffic.

    Args:
        memory: Seconds of work that count.
    """

    def __init__(self, memory: float = 10.0):
        self._memory = memory
        self._tokens = self._seconds = 0.0
        self._last = 0.0

    def start(self) -> None:
        """Start the clock: work begins after an idle time."""
        self._last = time.monotonic()

    def step(self, tokens: int) -> None:
        """Count the tokens of all rows of a batch that were generated since the last step."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        kept = max(0.0, 1 - passed / self._memory)
        self._tokens, self._seconds = kept * self._tokens + tokens, kept * self._seconds + passed

    def seconds(self, tokens: int) -> float:
        """Return how long it takes to generate some tokens; 0 before anything was measured."""
        return tokens * self._seconds / self._tokens if self._tokens else 0.0
