"""`report_to`: trackers record the log of the report, and it stays on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.training.run import train


@pytest.fixture
def logged(recipe: dict[str, Any]) -> dict[str, Any]:
    """Two steps, each of them logged, and a validation."""
    return {**recipe, "num_train_epochs": 1, "logging_steps": 1, "generation": {"max_new_tokens": 2}}


def test_tensorboard(logged: dict[str, Any]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = train({**logged, "report_to": "tensorboard"})
    (run,) = Path(logged["output_dir"], "runs").iterdir()
    events = accumulator.EventAccumulator(str(run))
    events.Reload()
    for name, key in {"train/loss": "loss", "train/grad_norm": "grad_norm", "eval/chrf": "eval_chrf"}.items():
        expected = {row["step"]: row[key] for row in report["log"] if key in row}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected), name
        assert expected


@pytest.mark.slow
def test_wandb_offline(logged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train({**logged, "report_to": "wandb", "run_name": "mine"})
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert run.stat().st_size > 1000  # in a format of its own


@pytest.mark.slow
def test_trackio(logged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    train({**logged, "report_to": "trackio", "project": "llm2slm", "run_name": "mine"})
    (run,) = trackio.Api().runs("llm2slm")
    assert run.name == "mine"
    assert list(tmp_path.glob("trackio/llm2slm.*"))
