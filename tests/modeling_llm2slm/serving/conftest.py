"""The model that the tests of the server share, its prompts, and servers of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import write_checkpoint
from tests.support.common import PROMPTS
from tests.support.serving import OUTPUTS, Client, served_model, serving


@pytest.fixture(scope="package")
def model() -> TextToText:
    return served_model()


@pytest.fixture(scope="package")
def prompts(model: TextToText) -> list[str]:
    """The prompts of `OUTPUTS`."""
    texts = [model.processor.tokenizer.decode(ids[:-1]) for ids in PROMPTS]
    assert model.generate(texts) == OUTPUTS
    return texts


@pytest.fixture
def client(model: TextToText) -> Iterator[Client]:
    with serving(model, max_wait=30) as client:
        yield client


@pytest.fixture(scope="package")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a composite."""
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("served"))
