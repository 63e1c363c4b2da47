"""Trainings that fail: they stop at the first step that is not finite, and keep the last good checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer

from modeling_llm2slm.data import resources
from modeling_llm2slm.evaluation import metrics
from modeling_llm2slm.training.resuming import TrainingFailed, last_checkpoint
from modeling_llm2slm.training.run import train
from modeling_llm2slm.training.trainer import TextToTextTrainer
from tests.support.checkpoints import KINDS, stopped_at
from tests.support.training import weights


NAN = float("nan")


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, value: float = NAN) -> None:
    """Let the loss of the given training batch, counted from 1, be a value that is not finite."""
    calls, compute_loss = [], Seq2SeqTrainer.compute_loss

    def computing(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, model, *args, **kwargs)
        if model.training:
            calls.append(1)
        return loss * value if model.training and len(calls) == call else loss

    monkeypatch.setattr(Seq2SeqTrainer, "compute_loss", computing)


def files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("validated", [True, False])
def test_a_training_that_diverges_saves_no_model(recipe, checkpoints, kind, validated):
    recipe = {**recipe, "model": checkpoints[kind], "learning_rate": 1e30, "metric": "loss"}
    if not validated:
        recipe["validation_data"] = None
    with pytest.raises(
        TrainingFailed, match=r"is (nan|inf) at step \d, with learning rate \S+e\+\d\d in float32.*Lower"
    ):
        train(recipe)
    assert files(recipe["output_dir"]) == {"recipe.json", "failure.json"}


def test_the_weights_of_the_last_step_are_checked_too(recipe):
    recipe = {**recipe, "learning_rate": 1e30, "validation_data": None, "metric": "loss", "max_steps": 1}
    with pytest.raises(TrainingFailed, match="training loss is (nan|inf) at step 1"):
        train({**recipe, "save_strategy": "no"})
    assert files(recipe["output_dir"]) == {"recipe.json", "failure.json"}


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_last_good_checkpoint_is_kept(recipe, monkeypatch, value, accumulated):
    size = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    recipe, out = {**recipe, **size}, Path(recipe["output_dir"])
    with monkeypatch.context() as patch:
        fail_at(patch, 5 * accumulated - (accumulated - 1), value)  # the first batch of step 5
        with pytest.raises(
            TrainingFailed, match=f"training loss is (nan|inf) at step 5.*The last good checkpoint is {out}/"
        ):
            train(recipe)
    assert last_checkpoint(out) == str(out / "checkpoint-4")
    assert all(tensor.isfinite().all() for tensor in weights(out / "checkpoint-4").values())
    assert not (out / "config.json").exists()
    with pytest.raises(ValueError, match="failed with this recipe, and would fail again. The training loss"):
        train(recipe)
    with pytest.raises(ValueError, match="was started with learning_rate: 0.003.* 0.0001. Choose another output_dir"):
        train({**recipe, "learning_rate": 1e-4})
    assert train({**recipe, "max_grad_norm": 1, "logging_steps": 1})["resumed_at_step"] == 4
    assert not (out / "failure.json").exists()


def test_training_again_from_scratch_forgets_the_failure(recipe, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(TrainingFailed):
            train(recipe)
    assert train({**recipe, "resume": False})["steps"] == 6
    assert train(recipe)["already_trained"]


@pytest.mark.parametrize(("fp16", "scale", "stops"), [(False, None, True), (True, 2.0, False), (True, 0.5, True)])
def test_only_the_scaler_of_float16_may_skip_steps(monkeypatch, tmp_path, fp16, scale, stops):
    monkeypatch.setattr(Seq2SeqTrainer, "_get_grad_norm", lambda *_, **__: torch.tensor(torch.inf))
    own: Any = object.__new__(TextToTextTrainer)
    own.args = SimpleNamespace(fp16=fp16, bf16=False, output_dir=str(tmp_path))
    own.accelerator = SimpleNamespace(scaler=scale and SimpleNamespace(get_scale=lambda: scale))
    own.state, own._last_learning_rate = SimpleNamespace(global_step=6), 1e-3
    if not stops:
        assert own._get_grad_norm(None) == torch.inf
        return
    with pytest.raises(TrainingFailed, match="gradient norm is inf at step 7, with learning rate 0.001"):
        own._get_grad_norm(None)


def test_a_gradient_that_is_not_finite_changes_no_weight(recipe, monkeypatch):
    norm = Seq2SeqTrainer._get_grad_norm
    norms = iter([False] * 4 + [True])
    monkeypatch.setattr(
        Seq2SeqTrainer, "_get_grad_norm", lambda *args, **kwargs: NAN if next(norms) else norm(*args, **kwargs)
    )
    with pytest.raises(TrainingFailed, match=r"gradient norm is nan at step 5.*checkpoint-4\.$"):
        train(recipe)


@pytest.mark.parametrize("values", [[NAN, NAN], [NAN, 1.0]])
def test_a_validation_loss_that_is_not_finite_ends_the_training(recipe, monkeypatch, values):
    losses = iter([1.0, 1.0, *values])
    monkeypatch.setattr(Seq2SeqTrainer, "prediction_step", lambda *_, **__: (torch.tensor(next(losses)), None, None))
    recipe = {**recipe, "metric": "loss", "per_device_eval_batch_size": 4}
    with pytest.raises(TrainingFailed, match=r"validation loss is nan at step 4.*checkpoint-2\.$"):
        train(recipe)
    state = json.loads((Path(recipe["output_dir"]) / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "it does not hold a mapping"),
        (b'{"steps": "six", "epochs": 1, "seconds": 1}', "steps is 'six', but it must be a whole number from 0"),
        (b'{"steps": 6, "epochs": NaN, "seconds": 1}', "epochs is nan"),
        (b'{"steps": 6', "truncated or corrupted"),
        (b"\xff\xfe", "truncated or corrupted"),
        (b"", "truncated or corrupted"),
        (b"[" * 100_000, "truncated or corrupted"),
    ],
)
def test_a_damaged_report_is_named(recipe, content, message):
    out = Path(recipe["output_dir"])
    out.mkdir()
    (out / "training.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"training.json .*{message}.*resume: false"):
        train(recipe)
    assert train({**recipe, "resume": False, "max_steps": 1})["steps"] == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_when_a_training_resumes(recipe, name):
    with stopped_at(5):
        train(recipe)
    file = Path(recipe["output_dir"], "checkpoint-4", name)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OSError, match=r"checkpoint-4 is damaged \(.*\)\. Remove this folder to resume from"):
        train(recipe)


def test_disk_space_is_checked_before_the_first_step(recipe, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(TextToTextTrainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(
        OSError, match=r"out needs [\d.]+ kB, but 1\.0 kB are free. Free disk space, or choose another"
    ):
        train(recipe)


def test_packages_are_checked_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(metrics, "is_installed", lambda package: False)
    with pytest.raises(ImportError, match="sacrebleu is not installed"):
        train({**recipe, "model": "no/such/folder"})
