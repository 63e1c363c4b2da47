"""Run a function in a child process that may take a limited amount of memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.filesize import decimal
from transformers.utils import logging

from ..data.resources import peak_memory, private_memory


Progress = Callable[[str], None]
OUT_OF_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "bad_alloc",
    "failed to map segment",
)  # fmt: skip
# Signals that end a process which takes too much memory: of the system, and of libraries that cannot go without it.
FATAL = {-getattr(signal, name, 0) for name in ("SIGABRT", "SIGBUS", "SIGKILL", "SIGSEGV")} - {0}


class MemoryLimitError(OSError):
    """A function needs more memory than it may take."""


def run_limited(
    function: Callable[[Progress], Any],
    limit: int,
    progress: Progress = lambda step: None,
) -> tuple[Any, int]:
    """
    Call a function in a child process, which ends with this call.

    Args:
        function: Called in the child with a function that reports progress. It can be pickled.
        limit: Bytes that it may take in addition to its libraries. Only Linux enforces the limit.
        progress: Called in this process with what the function reports.

    Returns:
        The result, which can be pickled, and the bytes that the child took at most in addition to its libraries.

    Raises:
        MemoryLimitError: If it needs more memory, or the system ended it for want of memory.
        Exception: What the function raises.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    state = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    child = context.Process(target=_work, args=(function, limit, sender, state), daemon=True)
    child.start()
    sender.close()  # the child alone holds it: when the child ends, reading ends
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "error":
                raise value
            if kind == "result":
                return value
            progress(value)
    except EOFError:
        child.join()
        if child.exitcode in FATAL:
            raise _over(limit) from None
        raise OSError(f"The child process ended with status {child.exitcode} and without a result.") from None
    finally:
        child.kill()
        child.join()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is too small."""
    return isinstance(error, MemoryError | MemoryLimitError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _work(function: Callable[[Progress], Any], limit: int, sender: Connection, state: tuple[int, int, bool]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threads, verbosity, with_bars = state
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    if not with_bars:
        logging.disable_progress_bar()
    before = peak_memory()
    if sys.platform == "linux":
        import resource

        most = private_memory() + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        result = function(lambda step: sender.send(("progress", step)))
        sender.send(("result", (result, peak_memory() - before)))
    except Exception as error:
        sender.send(("error", _over(limit) if is_out_of_memory(error) else _to_send(error)))
    sender.close()
    sys.stderr.flush()
    os._exit(0)  # functions that libraries run at the end may need memory that the limit does not leave


def _over(limit: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"This needs more than {decimal(limit)} of memory, the limit (--memory). Raise it or free some memory, "
        "shorten prompts and outputs (--prompt-max-length, --max-new-tokens), or take smaller models."
    )


def _to_send(error: Exception) -> Exception:
    """Return an error of one of the kinds that commands print, with its text alone: others may not be pickled."""
    kinds = (FileNotFoundError, OSError, ImportError, ValueError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), None)
    return kind(str(error)) if kind is not None else RuntimeError(f"{type(error).__name__}: {error}")
