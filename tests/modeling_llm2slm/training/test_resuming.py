"""Resuming a training: to the same weights, and never with another recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modeling_llm2slm.data.output_paths import locked
from modeling_llm2slm.training import run
from modeling_llm2slm.training.resuming import last_checkpoint
from modeling_llm2slm.training.run import train
from tests.support.checkpoints import PAIRS, stopped_at, write_pairs
from tests.support.common import same_tensors
from tests.support.training import weights


def test_stopped_run_resumes_to_the_same_weights(recipe, tmp_path):
    train({**recipe, "output_dir": str(tmp_path / "whole")})
    with stopped_at(5):
        train(recipe)
    assert not (Path(recipe["output_dir"]) / "config.json").exists()  # nothing that looks like a result
    out = Path(recipe["output_dir"])
    unfinished = [out / ".0123abcd.checkpoint-6", out.with_name(".0123abcd.out")]  # as killed saves leave them
    others = [out / ".0123.checkpoint-6", out.with_name(".my-notes.out")]
    for folder in (*unfinished, *others):
        folder.mkdir()
    report = train(recipe)
    assert [folder.exists() for folder in (*unfinished, *others)] == [False, False, True, True]
    assert (report["resumed_at_step"], report["steps"]) == (4, 6)
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-1}, "was started with learning_rate: 0.003, and cannot resume with 0.1"),
        ({"train_data": "other.jsonl"}, "was started with train_data: pairs.jsonl"),
        ({"lr_scheduler_type": "constant"}, "was started with lr_scheduler_type"),
        ({"per_device_train_batch_size": 2}, "was started with effective batch size: 4, and cannot resume with 2"),
        ({"max_grad_norm": 5}, "was started with max_grad_norm: 1.0"),
        ({"metric": "bleu"}, "was started with metric_for_best_model: eval_chrf, and cannot resume with eval_bleu"),
        ({"validation_samples": 3}, "was started with validation_samples: None, and cannot resume with 3"),
    ],
)
def test_run_does_not_resume_with_another_recipe(recipe, tmp_path, change, message):
    train({**recipe, "num_train_epochs": 1})
    write_pairs(tmp_path / "other.jsonl", PAIRS[::-1])
    if "train_data" in change:
        change = {"train_data": str(tmp_path / "other.jsonl")}
    steps = 24 // (change.get("per_device_train_batch_size") or 4)
    with pytest.raises(ValueError, match=rf"{message}.*another output_dir, or train from scratch with resume: false"):
        train({**recipe, **change})
    assert train({**recipe, **change, "resume": False})["steps"] == steps
    assert train({**recipe, **change, "num_train_epochs": 4})["resumed_at_step"] == steps


def test_run_resumes_with_the_same_effective_batch_size_but_not_with_other_data_of_the_same_name(recipe):
    train({**recipe, "num_train_epochs": 1})
    accumulated = {**recipe, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train({**accumulated, "num_train_epochs": 2})["steps"] == 4
    write_pairs(Path(recipe["train_data"]), PAIRS[:-1])
    with pytest.raises(
        ValueError,
        match=r"was started with bytes of train_data: \d+, and cannot resume with \d+\. Set it",
    ):
        train(recipe)


def test_finished_run_is_not_taken_for_one_with_another_recipe(recipe):
    train({**recipe, "max_steps": 1})
    with pytest.raises(ValueError, match="was started with learning_rate: 0.003"):
        train({**recipe, "max_steps": 1, "learning_rate": 1e-1})


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 1.5}])
def test_run_stopped_before_its_model_was_saved_takes_no_further_step(recipe, tmp_path, length):
    first = train({**recipe, "save_steps": 1, **length})
    assert first["steps"] == 3
    Path(recipe["output_dir"], "training.json").unlink()
    assert train({**recipe, "save_steps": 1, **length})["steps"] == 3


def test_incomplete_checkpoint_is_ignored(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, complete in ((90, True), (100, True), (110, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-110" / "trainer_state.json").write_text('{"epoch": 1.')  # killed while it was written
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_whose_state_is_damaged_is_named(recipe):
    times = {"save_strategy": "steps", "save_steps": 1}
    train({**recipe, "max_steps": 1, **times})
    file = Path(recipe["output_dir"], "checkpoint-1", "trainer_state.json")
    state = json.loads(file.read_text())
    for name in ("global_step", "train_batch_size", "epoch", "log_history", "stateful_callbacks"):
        file.write_text(json.dumps({**state, name: "x"}))
        with pytest.raises(
            ValueError, match=rf"trainer_state.json cannot be read: {name} is 'x', .* Remove .*-1 to res"
        ):
            train({**recipe, "max_steps": 2, **times})


@pytest.mark.parametrize("length", [{}, {"max_steps": 6}])
def test_resume_false_trains_from_scratch(recipe, tmp_path, length):
    """Killed, it resumes from its own last checkpoint, not from one of the earlier run."""
    other = {**recipe, **length, "learning_rate": 1e-2}
    train({**other, "output_dir": str(tmp_path / "whole")})
    train({**recipe, **length, "save_total_limit": 9})
    with stopped_at(3):
        train({**other, "resume": False})
    report = train(other)
    assert (report["resumed_at_step"], report["steps"]) == (2, 6)
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "whole"))


def test_resume_false_does_not_remove_the_model_it_starts_from(recipe):
    train({**recipe, "max_steps": 2})
    checkpoint = last_checkpoint(recipe["output_dir"])
    with pytest.raises(ValueError, match=r"resume: false removes .*checkpoint-2, which the training starts from"):
        train({**recipe, "model": checkpoint, "resume": False})
    assert last_checkpoint(recipe["output_dir"]) == checkpoint


def test_finished_run_with_the_same_or_fewer_epochs_is_left_as_it_is(recipe, caplog):
    first = train({**recipe, "num_train_epochs": 2})
    out = Path(recipe["output_dir"])
    before = {name: (out / name).read_bytes() for name in ("training.json", "README.md") if (out / name).is_file()}
    for epochs in ("2", "1"):
        caplog.clear()
        assert train({**recipe, "num_train_epochs": epochs}) == {**first, "already_trained": True}
        assert f"{out} is already trained (4 steps, 2 epochs): nothing to do. Choose another output_dir, or set " in (
            caplog.text
        )
    assert {name: (out / name).read_bytes() for name in before} == before
    assert train({**recipe, "num_train_epochs": 3})["resumed_at_step"] == first["steps"]


def test_report_holds_overrides_that_are_text_with_their_types(recipe):
    given = {"num_train_epochs": "1", "learning_rate": "3e-3", "generation": "{max_new_tokens: 8}", "resume": "true"}
    typed = {"num_train_epochs": 1, "learning_rate": 3e-3, "generation": {"max_new_tokens": 8}, "resume": True}
    found = train({**recipe, **given})["recipe"]
    assert found == {**recipe, **typed}
    assert not any(isinstance(found[name], str) for name in given)


def test_finished_run_is_not_trained_further(recipe):
    """From a checkpoint at `max_steps` the Trainer would take one step more, each time."""
    first = train({**recipe, "max_steps": 2})
    weights = Path(recipe["output_dir"], "model.safetensors").read_bytes()
    again = train({**recipe, "max_steps": 2})
    assert again["steps"] == first["steps"] == 2
    assert Path(recipe["output_dir"], "model.safetensors").read_bytes() == weights
    assert train({**recipe, "max_steps": 3})["steps"] == 3


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "adapter_config.json", "checkpoint-4/trainer_state.json", "store.json"],
)
@pytest.mark.parametrize("resume", [True, False])
def test_folder_of_another_model_stays(recipe, name, resume, monkeypatch):
    monkeypatch.setattr(run, "load_to_train", lambda *_: pytest.fail("the model was loaded"))
    file = Path(recipe["output_dir"], name)
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out holds a model that no training has written\. Choose another"):
        train({**recipe, "resume": resume})
    assert file.read_text() == "mine"


def test_folder_with_other_files_is_used(recipe):
    folder = Path(recipe["output_dir"])
    folder.mkdir()
    for name in ("recipe.yaml", "notes.txt", "prepare.py"):
        (folder / name).touch()
    assert train({**recipe, "max_steps": 1})["steps"] == 1
    assert (folder / "prepare.py").exists()


def test_model_is_not_trained_in_its_own_place(recipe, checkpoints, tmp_path):
    shutil.copytree(checkpoints["slm"], tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    for output_dir in ("model", "link"):
        with pytest.raises(ValueError, match="which the trained model in .* would replace. Choose another output_dir"):
            train({**recipe, "model": str(tmp_path / "model"), "output_dir": str(tmp_path / output_dir)})


def test_finished_model_without_checkpoints_is_not_replaced(recipe):
    train({**recipe, "num_train_epochs": 1})
    out = Path(recipe["output_dir"])
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(FileExistsError, match="holds a finished training, and no checkpoint to resume from"):
        train(recipe)
    with pytest.raises(ValueError, match="was started with learning_rate"):
        train({**recipe, "learning_rate": 1.0})
    assert train({**recipe, "resume": False})["steps"] == 6


def test_two_runs_do_not_share_a_folder(recipe):
    with locked(recipe["output_dir"]), pytest.raises(BlockingIOError, match="out is being written by another run"):
        train(recipe)
    assert not Path(recipe["output_dir"]).exists()
