"""Comparisons of a tiny composite with its LLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.app import Service
from modeling_llm2slm.serving.playground.comparison import Comparison
from modeling_llm2slm.serving.playground.llm import ComparedLLM
from modeling_llm2slm.settings import ServeSettings
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="package")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of an LLM-to-SLM model, an encoder-decoder LLM and a decoder-only LLM."""
    folder = tmp_path_factory.mktemp("compared")
    return {kind: write_checkpoint(kind, folder / kind) for kind in ("llm2slm", "llm", "slm")}


@pytest.fixture
def load(checkpoints: dict[str, str]) -> Callable[[str], TextToText]:
    return lambda kind: TextToText.from_pretrained(checkpoints[kind])


@pytest.fixture
def compare(load: Callable[[str], TextToText]) -> Iterator[Callable[..., Comparison]]:
    """Return a comparison that runs until the end of the test, given its LLM and some [`ServeSettings`]."""
    with ExitStack() as stack:

        def start(llm: ComparedLLM, **settings: Any) -> Comparison:
            service = Service(load("llm2slm"), ServeSettings(name="tiny", **settings))
            comparison = Comparison(service, llm)
            for one in (service.batcher, comparison):
                one.start()
                stack.callback(one.stop)
            return comparison

        yield start
