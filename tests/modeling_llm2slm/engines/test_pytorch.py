"""PyTorch: options that a checkpoint does not support."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modeling_llm2slm.engines.pytorch import PyTorchEngine
from modeling_llm2slm.inference.engine import LoadOptions
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("slm", tmp_path_factory.mktemp("checkpoint"))


def test_pytorch_loads_whatever_no_other_engine_claims(slm: str) -> None:
    engine = PyTorchEngine()
    assert engine.can_load(slm)
    assert engine.can_load("a-name/on-the-hub")
    assert engine.load(slm, LoadOptions(target_max_length=3)).target_max_length == 3


def test_an_unknown_device_is_an_error_of_one_line(slm: str) -> None:
    with pytest.raises(ValueError, match="cannot be moved to nonsense") as caught:
        PyTorchEngine().load(slm, LoadOptions(device="nonsense"))
    assert "\n" not in str(caught.value)


def test_stored_hidden_states_need_an_llm2slm_model(slm: str, tmp_path: Path) -> None:
    store: Any = SimpleNamespace(path=tmp_path)
    with pytest.raises(ValueError, match="only LLM-to-SLM models take hidden states"):
        PyTorchEngine().load(slm, LoadOptions(states=store))
