"""Checkpoints spoilt at random load, or end in a clear error, in bounded time and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.conversions import write_sources
from tests.support.fuzzing import spoilt


CASES, CHUNKS = 360, 6  # chunks, so that none takes long
SECONDS, MEGABYTES = 20, 300


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def outcome(load: Callable[[Path], Any], path: Path) -> tuple[str, str]:
    """The kind of error and what it says, or "loaded"."""
    try:
        load(path)
    except (OSError, ValueError, RuntimeError) as error:
        return type(error).__name__, str(error).strip()
    return "loaded", "The checkpoint is as good as it was."


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_damaged_checkpoint_loads_or_raises_an_error_with_its_reason(chunk, sources, tmp_path):
    outcomes: dict[str, int] = {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(chunk, CASES, CHUNKS):
        path = spoilt(sources / ("lean" if seed % 3 == 0 else "full"), sources / f"spoilt{chunk}", seed)
        start = time.perf_counter()
        # The command's way in promises one sentence of an OSError or ValueError, the library's a clear error.
        load = TextToText.from_pretrained if seed % 2 else LLM2SLMForConditionalGeneration.from_pretrained
        result, message = outcome(load, path)
        assert time.perf_counter() - start < SECONDS, f"seed {seed} takes too long"
        assert len(message) > 20, f"seed {seed} says nothing"
        assert seed % 2 == 0 or result in {"loaded", "OSError", "ValueError", "FileNotFoundError"}, f"seed {seed}"
        outcomes[result] = outcomes.get(result, 0) + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    assert grown < MEGABYTES, "memory was taken for what a config claims"
    assert outcomes.get("loaded", 0) > CASES / CHUNKS / 10, outcomes
    assert sum(outcomes.values()) - outcomes.get("loaded", 0) > CASES / CHUNKS / 3, outcomes
