"""Trainings from a recipe: what they leave in the output folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.training import run, trainer
from modeling_llm2slm.training.run import train
from tests.support.checkpoints import KINDS, PAIRS, PROMPTS, TARGETS
from tests.support.common import same_tensors
from tests.support.training import weights


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_its_targets(recipe, checkpoints, kind):
    before = weights(checkpoints[kind])
    report = train(
        {
            **recipe,
            "model": checkpoints[kind],
            "metric": "exact_match",
            "label_smoothing_factor": 0.1,
            "optimizer": "adafactor" if kind == "llm" else "adamw",
            "learning_rate": 3e-2 if kind == "llm" else 1e-2,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "max_steps": 120,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 60,
            "save_steps": 60,
            "per_device_train_batch_size": 8,
            "train_sampling_strategy": "group_by_length",
        }
    )
    assert report["best_metric"] >= 80
    trained = TextToText.from_pretrained(recipe["output_dir"])
    assert trained.model.config.use_cache
    outputs = trained.generate(PROMPTS, max_new_tokens=8)
    assert sum(a == b for a, b in zip(outputs, TARGETS, strict=True)) / len(PAIRS) * 100 == report["best_metric"]
    after = weights(recipe["output_dir"])
    frozen = {name for name in before if name.startswith("encoder.llm.")} if kind == "llm2slm" else set()
    frozen |= {name for name in before if name.endswith(("projector.mean", "projector.scale"))}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


def test_report_holds_recipe_metrics_and_versions(recipe):
    report = train(recipe)
    written = json.loads((Path(recipe["output_dir"]) / "training.json").read_text())
    assert written == report
    assert report["recipe"] == recipe
    assert report["steps"] == 6
    assert [row["eval_chrf"] for row in report["log"] if "eval_chrf" in row]
    assert report["best_metric"] == max(row["eval_chrf"] for row in report["log"] if "eval_chrf" in row)
    assert report["versions"]["torch"] == torch.__version__


def test_report_does_not_record_bf16_that_was_left_out(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    plain = train({**recipe, "output_dir": str(tmp_path / "plain")})
    report = train({**recipe, "bf16": True})
    assert report["recipe"] == {**recipe, "bf16": False}
    assert report["best_metric"] == plain["best_metric"]
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "plain"))


def test_report_holds_no_token(recipe):
    recipe = {**recipe, "validation_data": None, "metric": "loss", "max_steps": 1}
    assert train({**recipe, "hub_token": "hf_secret"})["recipe"] == recipe
    assert "hf_secret" not in (Path(recipe["output_dir"]) / "training.json").read_text()


def test_saved_model_is_the_best_checkpoint(recipe, monkeypatch):
    scores = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(trainer, "score", lambda *_: {"chrf": next(scores)})
    report = train(recipe)
    assert (report["best_metric"], report["best_step"]) == (30.0, 4)
    same_tensors(weights(recipe["output_dir"]), weights(Path(recipe["output_dir"]) / "checkpoint-4"))
    last = weights(Path(recipe["output_dir"]) / "checkpoint-6")
    assert any(not torch.equal(tensor, last[name]) for name, tensor in weights(recipe["output_dir"]).items())


def test_failure_while_saving_leaves_no_model(recipe, monkeypatch):
    def fail(self: TextToText, path: Path) -> None:
        self.model.save_pretrained(path)
        raise OSError("disk full")

    monkeypatch.setattr(TextToText, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train(recipe)
    assert [path.name for path in Path(recipe["output_dir"]).glob("*.json")] == ["recipe.json"]


def test_loss_chooses_the_best_checkpoint(recipe):
    report = train({**recipe, "metric": "loss"})
    losses = [row["eval_loss"] for row in report["log"] if "eval_loss" in row]
    assert report["best_metric"] == min(losses)


def test_saved_model_is_the_last_without_validation(recipe):
    recipe = {key: value for key, value in recipe.items() if key not in ("validation_data", "metric")}
    report = train({**recipe, "train_samples": 4})
    assert (report["steps"], report["best_metric"]) == (3, None)
    same_tensors(weights(recipe["output_dir"]), weights(Path(recipe["output_dir"]) / "checkpoint-3"))


def test_lean_output_does_not_replace_its_own_llm(recipe, checkpoints, tmp_path):
    shutil.copytree(checkpoints["llm2slm"], tmp_path / "model")
    recipe |= {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "model"), "include_llm": False}
    with pytest.raises(ValueError, match="which a lean checkpoint in .*model would replace"):
        train(recipe)


def test_include_llm_false_saves_a_lean_model(recipe, checkpoints):
    out = Path(recipe["output_dir"])
    train({**recipe, "max_steps": 1, "model": checkpoints["llm2slm"], "include_llm": False})
    assert not any(name.startswith("encoder.llm.") for name in weights(out))
    start = TextToText.from_pretrained(checkpoints["llm2slm"]).model.encoder.llm.state_dict()
    trained = TextToText.from_pretrained(out).model.encoder.llm.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in start.items())


@pytest.mark.parametrize("held", [False, True])
def test_checkpoints_are_lean_by_default_and_the_model_is_full(held, recipe, checkpoints):
    out = Path(recipe["output_dir"])
    train({**recipe, "max_steps": 2, "model": checkpoints["llm2slm"], "include_llm_in_checkpoints": held})
    checkpoint = next(out.glob("checkpoint-*"))
    has_llm = [any(name.startswith("encoder.llm.") for name in weights(folder)) for folder in (out, checkpoint)]
    assert has_llm == [True, held]
    # This LLM is in no checkpoint of its own, but in the one that training started from.
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint)
    same_tensors(loaded.encoder.llm.state_dict(), TextToText.from_pretrained(out).model.encoder.llm.state_dict())
    assert "max_steps: 2" in (out / "README.md").read_text()


def test_an_output_folder_that_cannot_be_replaced_is_refused_before_anything_is_loaded(recipe, monkeypatch):
    output_dir = Path(recipe["output_dir"])
    output_dir.mkdir(parents=True)
    monkeypatch.setattr(run, "load_to_train", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != output_dir.parent)
    with pytest.raises(PermissionError, match="cannot be replaced"):
        train(recipe)
