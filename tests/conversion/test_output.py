"""Writing the result of a conversion: little memory, and enough disk space before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_llm2slm.conversion import output
from modeling_llm2slm.conversion.compose import compose
from modeling_llm2slm.data import resources
from tests.support.common import is_mapped
from tests.support.conversions import write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_one_shard_at_a_time_is_in_memory(sources, tmp_path, monkeypatch):
    sizes = []
    save = output.save_file

    def record(tensors: dict[str, torch.Tensor], *args: object, **kwargs: object) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values() if not is_mapped(tensor)))
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(output, "save_file", record)
    compose(sources / "llm", sources / "slm", tmp_path / "new", max_shard_size="20KB", fusion="add")
    new = 4 * (2 * 24 + 24 * 32 + 32 * 32 + 2 * 32 + 24 * 32)  # projector, with mean and scale; prompt embedding
    assert sum(sizes) <= new, "tensors that keep their dtype are mapped, not copied"


def test_a_full_disk_is_an_error_before_the_work(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"needs 214\.0 kB, but 1\.0 kB are free"):
        compose(sources / "llm", sources / "slm", tmp_path / "new")
    assert not list(tmp_path.iterdir())
