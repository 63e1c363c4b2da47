"""Resuming: what a training keeps in its output folder, and which settings a resumed run must not change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from ..data.atomic import remove_unfinished
from ..data.output_paths import MODEL_FILES, check_output
from ..data.records import (
    COUNT,
    MAPPING,
    NUMBER,
    TEXT,
    list_of,
    read_record,
    without_folders,
    without_secrets,
    write_json,
)
from .batches import effective_batch_size
from .recipe import Recipe, recipe_fields


REPORT = "training.json"
RECIPE = "recipe.json"
FAILURE = "failure.json"
STATE_FIELDS = {
    **dict.fromkeys(("global_step", "train_batch_size"), COUNT),
    "epoch": NUMBER,
    "log_history": list_of(MAPPING),
    "stateful_callbacks": MAPPING,
}
REPORT_FIELDS = {"steps": COUNT, "epochs": NUMBER, "seconds": NUMBER}
FROM_SCRATCH = "Restore it, choose another output_dir, or train from scratch with resume: false."
# Fields of the Trainer that a resumed run must keep: the optimizer, the learning rate schedule, the order of the data
# and the choice of the best checkpoint depend on them. The fields of `Recipe` declare this themselves.
FIXED = (
    "optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor", "seed", "data_seed",
    "train_sampling_strategy", "metric_for_best_model", "save_only_model",
)  # fmt: skip


class TrainingFailed(ValueError):
    """The loss or the gradient norm of a training is not finite."""


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint in a folder, or `None`."""
    # The Trainer writes trainer_state.json last, and not atomically.
    states = [path for path in Path(output_dir).glob("checkpoint-*/trainer_state.json") if _is_complete(path)]
    checkpoints = sorted(states, key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return str(checkpoints[-1].parent) if checkpoints else None


def check_checkpoint(checkpoint: str) -> None:
    """Raise `ValueError` if the Trainer's own state of a checkpoint lacks what a resumed run reads."""
    fix = f"Remove {checkpoint} to resume from the checkpoint before it, or train from scratch with resume: false."
    read_record(Path(checkpoint) / "trainer_state.json", fix, STATE_FIELDS)


def last_report(output_dir: str | Path) -> dict[str, Any]:
    """Return the report in an output folder, or an empty mapping; raise `ValueError` if it is damaged."""
    file = Path(output_dir) / REPORT
    return read_record(file, FROM_SCRATCH, REPORT_FIELDS) if file.is_file() else {}


def record_failure(output_dir: str | Path, recipe: Mapping[str, Any], error: TrainingFailed) -> None:
    """Record that a training failed, and with which recipe."""
    write_json(Path(output_dir) / FAILURE, {"message": str(error), "recipe": _as_recorded(recipe)})


def last_failure(output_dir: str | Path) -> dict[str, Any] | None:
    """Return the failure that ended the last training in an output folder, or `None`."""
    file = Path(output_dir) / FAILURE
    return read_record(file, FROM_SCRATCH, {"message": TEXT, "recipe": MAPPING}) if file.is_file() else None


def check_not_failed(output_dir: str | Path, recipe: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the training in an output folder failed with the same recipe."""
    failure = last_failure(output_dir)
    if failure is not None and failure["recipe"] == _as_recorded(recipe):
        raise ValueError(
            f"The training in {output_dir} failed with this recipe, and would fail again. {failure['message']}"
        )


def _as_recorded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(without_secrets(recipe), default=str))


def what_resumes(output_dir: str | Path, resume: bool) -> str:
    """Return what the same command does after a run in this folder was interrupted."""
    if not resume:
        return "To resume, set resume: true: the same command trains from scratch."
    begins = "" if last_checkpoint(output_dir) else " It starts from the beginning, as no checkpoint was written."
    return f"Repeat the command to resume.{begins}"


def finished_report(arguments: Seq2SeqTrainingArguments) -> dict[str, Any] | None:
    """Return the report of a run that has already trained for as many steps or epochs as the arguments ask for."""
    report = last_report(arguments.output_dir)
    if arguments.max_steps > 0:  # takes precedence over epochs in the Trainer
        return report if report.get("steps", 0) >= arguments.max_steps else None
    return report if (report.get("epochs") or 0) >= arguments.num_train_epochs - 1e-6 else None


def check_same_recipe(recipe: Recipe, arguments: Seq2SeqTrainingArguments) -> None:
    """Raise `ValueError` if the run in the output folder, which is to be resumed, started with another recipe."""
    file = Path(arguments.output_dir) / RECIPE
    if not file.is_file():
        return
    begun, now = read_record(file, FROM_SCRATCH), fixed_settings(recipe, arguments)
    failed = last_failure(arguments.output_dir) is not None
    for name in now:
        if name in begun and begun[name] != now[name]:
            repeat = "Choose" if failed else f"Set it to {begun[name]} again, choose"
            raise ValueError(
                f"{arguments.output_dir} was started with {name}: {begun[name]}, and cannot resume with {now[name]}. "
                f"{repeat} another output_dir, or train from scratch with resume: false."
            )


def check_folder(recipe: Recipe, arguments: Seq2SeqTrainingArguments) -> None:
    """
    Raise an error for an output folder that a training must not replace.

    Raises:
        FileExistsError: If it holds a model that no training has written.
        ValueError: If the training starts from it.
    """
    folder = Path(arguments.output_dir)
    check_output(folder, folder=True, overwrite=True)
    if os.path.exists(recipe.model) and folder.exists() and os.path.samefile(recipe.model, folder):
        result = "the trained model" if recipe.include_llm else "a lean checkpoint"
        raise ValueError(
            f"The training starts from {recipe.model}, which {result} in {folder} would replace. Choose another "
            "output_dir."
        )
    holds_model = folder.is_dir() and any(map(_is_of_model, os.listdir(folder)))
    if holds_model and not (folder / RECIPE).is_file():
        raise FileExistsError(f"{folder} holds a model that no training has written. Choose another output_dir.")


def _is_of_model(name: str) -> bool:
    is_file_of_model = MODEL_FILES.fullmatch(name) is not None and not name.endswith(".py") and name != REPORT
    return is_file_of_model or name.startswith("checkpoint-")


def check_start_is_kept(recipe: Recipe, arguments: Seq2SeqTrainingArguments) -> None:
    """Raise `ValueError` if `resume: false` would remove the checkpoint that the training starts from."""
    removed = Path(arguments.output_dir).resolve().glob("checkpoint-*") if not recipe.resume else []
    if any(Path(recipe.model).resolve().is_relative_to(folder) for folder in removed):
        raise ValueError(f"resume: false removes {recipe.model}, which the training starts from: move it elsewhere.")


def prepare_output_dir(recipe: Recipe, arguments: Seq2SeqTrainingArguments) -> None:
    """Remove what killed runs left unfinished and, without `resume`, the earlier run; record the recipe."""
    output_dir = Path(arguments.output_dir)
    remove_unfinished(output_dir)
    remove_unfinished(output_dir / "checkpoint-*")
    (output_dir / FAILURE).unlink(missing_ok=True)
    if not recipe.resume:
        (output_dir / REPORT).unlink(missing_ok=True)
        for checkpoint in output_dir.glob("checkpoint-*"):
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)  # a half-removed one is not resumed from
            shutil.rmtree(checkpoint)
    write_json(output_dir / RECIPE, fixed_settings(recipe, arguments))


def fixed_settings(recipe: Recipe, arguments: Seq2SeqTrainingArguments) -> dict[str, Any]:
    """Return the settings that a resumed run must keep. Models and data may move: only the names of paths count."""
    kept = [field.name for field in recipe_fields() if field.fixed is True or (field.fixed and recipe.streaming)]
    settings = without_folders({name: getattr(recipe, name) for name in kept})
    settings |= {name: getattr(arguments, name) for name in FIXED}
    settings["effective batch size"] = effective_batch_size(arguments)
    if recipe.streaming:
        settings["dataloader_num_workers"] = arguments.dataloader_num_workers
    if recipe.streaming and arguments.dataloader_num_workers > 1:  # workers take turns by batches of this size
        settings["per_device_train_batch_size"] = arguments.per_device_train_batch_size
    if Path(recipe.train_data).is_file() and not recipe.streaming:
        settings["bytes of train_data"] = Path(recipe.train_data).stat().st_size
    return json.loads(json.dumps(settings, default=str))


def _is_complete(path: Path) -> bool:
    try:
        read_record(path, "")
    except ValueError:
        return False
    return True
