"""Tiny checkpoints of every kind, and the outputs that batches must reproduce."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import KINDS, PROMPTS, write_checkpoint


MAX_NEW_TOKENS = 5
REPEATED = [PROMPTS[0], *PROMPTS, PROMPTS[0], PROMPTS[3]]  # 8 distinct prompts in 11 rows


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_checkpoint(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, str]) -> dict[str, TextToText]:
    """Loaded checkpoints, not to be changed."""
    return {kind: TextToText.from_pretrained(path) for kind, path in checkpoints.items()}


@pytest.fixture(scope="session")
def composite(checkpoints: dict[str, str]) -> str:
    return checkpoints["llm2slm"]


@pytest.fixture(scope="session")
def alone(models: dict[str, TextToText]) -> list[str]:
    """The output for each of `REPEATED`, generated alone."""
    return [models["llm2slm"].generate([prompt], max_new_tokens=MAX_NEW_TOKENS)[0] for prompt in REPEATED]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in REPEATED))
    return path


@contextmanager
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """Record the shape `(B, N)` of each batch that is read and whether the main thread reads it, and output counts."""
    seen: dict[str, list[Any]] = {"read": [], "written": [], "main_thread": []}
    read, write = TextToText.read, TextToText.write

    def recording_read(self: TextToText, features: Any) -> Any:
        inputs = read(self, features)
        seen["read"].append(tuple(inputs["input_ids"].shape))
        seen["main_thread"].append(threading.current_thread() is threading.main_thread())
        return inputs

    def recording_write(self: TextToText, inputs: Any, **kwargs: Any) -> Any:
        outputs = write(self, inputs, **kwargs)
        seen["written"].append(len(outputs))
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(TextToText, "read", recording_read)
        patch.setattr(TextToText, "write", recording_write)
        yield seen
