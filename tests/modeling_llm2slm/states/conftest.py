"""A tiny checkpoint of each kind, and copies to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import KINDS, write_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: Path(write_checkpoint(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}


@pytest.fixture
def copies(checkpoints: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {kind: Path(shutil.copytree(path, tmp_path / kind)) for kind, path in checkpoints.items()}
