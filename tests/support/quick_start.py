"""Child processes of the package that start in milliseconds: an import of torch and transformers takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


# What children need is imported once, in the server.
PRELOAD = ["torch", "transformers", "datasets", "modeling_llm2slm.workflows.plan", "modeling_llm2slm.training.run"]


def server() -> Any:
    """
    The context of children that are forks of a server which has imported the package. Unlike the process of the tests,
    the server has no threads of engines, which forks do not always survive.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start_quickly(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let a module take its child processes from the server, in place of spawning them."""
    context = server()
    monkeypatch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda method: context))


def forked(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, which may fork processes such as workers of a DataLoader, in a child of the server."""
    receiver, sender = server().Pipe(duplex=False)
    child = server().Process(target=_call, args=(sender, function, args))
    child.start()
    sender.close()
    found = receiver.recv()
    child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _call(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(function(*args))
    except Exception as error:
        sender.send(error)
