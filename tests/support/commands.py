"""Run the `llm2slm` command in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm2slm
from llm2slm import output


ROOT = Path(__file__).parents[2]


def widen_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the command a terminal so wide that it wraps nothing it prints."""
    monkeypatch.setenv("COLUMNS", "200")
    for console in (output.out, output.err):
        monkeypatch.setattr(console, "width", 200)


def run(*arguments: Any) -> int:
    """Run the command and return its exit status."""
    try:
        llm2slm.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def run_in_new_process(*arguments: str, code: str | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the command, or Python code, in a process of its own, and capture what it prints."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "llm2slm", *arguments])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **kwargs)


def kill_when(reached: Callable[[], bool], *words: Any) -> None:
    """Start Python in a process of its own, and kill it as soon as a condition holds."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the tests: more threads add in another order
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not reached():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
