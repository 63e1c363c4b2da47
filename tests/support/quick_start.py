"""Child processes of the package that start in milliseconds: an import of torch and transformers takes seconds."""

from __future__ import annotations

import multiprocessing
from types import ModuleType, SimpleNamespace

import pytest


# What children need is imported once, in the server.
PRELOAD = ["torch", "transformers", "datasets", "modeling_llm2slm.workflows.plan"]


def start_quickly(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """
    Let a module take its child processes from a server that has imported the package, in place of spawning them. The
    server has no threads of engines, which forks of the process of the tests do not always survive. The children start
    no processes themselves: theirs would come from servers too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    monkeypatch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
