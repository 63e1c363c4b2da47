"""Tiny checkpoints of every kind, and a recipe that trains one of them in six steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import KINDS, write_checkpoint, write_pairs


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_checkpoint(kind, folder / kind) for kind in KINDS}


@pytest.fixture
def recipe(checkpoints: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """An SLM alone, validated after each of three epochs of two steps."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    return {
        "model": checkpoints["slm"],
        "train_data": data,
        "validation_data": data,
        "output_dir": str(tmp_path / "out"),
        "metric": "chrf",
        "generation": {"max_new_tokens": 8},
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }
