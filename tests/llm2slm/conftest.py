"""A wide terminal, a checkpoint and a recipe for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import write_checkpoint, write_pairs
from tests.support.commands import widen_terminal


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a command prints is wrapped."""
    widen_terminal(monkeypatch)


@pytest.fixture(scope="session")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An LLM-to-SLM checkpoint with random weights, for all tests."""
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("composite"))


@pytest.fixture
def recipe(composite: str, tmp_path: Path) -> Path:
    """A recipe of two steps, with its data in `pairs.jsonl`."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "recipe.yaml"
    fields = {
        "model": composite, "train_data": data, "validation_data": data, "output_dir": str(tmp_path / "out"),
        "metric": "bleu", "generation": {"max_new_tokens": 4}, "max_steps": 2, "per_device_train_batch_size": 4,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(fields))
    return path
