"""Training from a recipe: the same for an LLM, an SLM alone and an LLM-to-SLM model."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, set_seed

from ..checkpoint_llm2slm import LLM_PREFIX
from ..configuration_llm2slm import LLM2SLMConfig
from ..data.atomic import atomic_write, check_replaceable
from ..data.output_paths import locked
from ..data.records import versions, without_secrets
from ..data.resources import check_disk_space
from ..evaluation.metrics import check_installed
from ..fusion_llm2slm import fusion_of
from ..inference.saving import check_not_replaced
from ..inference.text_to_text import TextToText
from .callbacks import ProgressLines, progress_lines
from .checks import check_trainable
from .features import training_data
from .model import gather_sharded, load_to_train, merge_and_restore, refer_to_llm, source_of_llm
from .recipe import Recipe, parse_recipe, typed_recipe
from .resuming import (
    REPORT,
    TrainingFailed,
    check_checkpoint,
    check_folder,
    check_not_failed,
    check_same_recipe,
    check_start_is_kept,
    finished_report,
    last_checkpoint,
    last_report,
    prepare_output_dir,
    record_failure,
)
from .trainer import TextToTextTrainer


logger = logging.getLogger(__name__)


def train(recipe: Mapping[str, Any], quiet: bool = False) -> dict[str, Any]:
    """
    Train a model as a recipe says, and save the best one to `output_dir`.

    A run that was stopped resumes from its last complete checkpoint. The report in `training.json`, next to the model,
    holds the recipe, the metrics of every validation, the time taken and the versions used. Every 30 seconds a line of
    progress is printed to standard error, if that is not a terminal.

    Args:
        recipe: The fields of [`Recipe`] and of [`~transformers.Seq2SeqTrainingArguments`] in one mapping.
        quiet: Show no progress.

    Returns:
        The report; with `already_trained: True` if the run had finished before, and nothing was done.

    Raises:
        ValueError: If the recipe is wrong, its data has bad rows, or it differs from the one of the run to resume.
        OSError: If a model or data cannot be read, a checkpoint cannot be written, the output folder holds another
            model, or another run writes to it.
        TrainingFailed: If a loss or a gradient norm is not finite. The last good checkpoint is kept, and no model is
            saved. It is a `ValueError`.
    """
    ours, arguments = parse_recipe(recipe)
    check_trainable(ours, arguments)
    recipe = typed_recipe(recipe, ours, arguments)
    if "bf16" in recipe:
        recipe["bf16"] = arguments.bf16  # the report holds what was done
    check_folder(ours, arguments)
    with locked(arguments.output_dir, arguments.process_index):
        return _resume(ours, arguments, recipe, quiet)


def _resume(
    ours: Recipe, arguments: Seq2SeqTrainingArguments, recipe: Mapping[str, Any], quiet: bool
) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one, unless the run has finished."""
    finished = finished_report(arguments) if ours.resume else None
    checkpoint = last_checkpoint(arguments.output_dir) if ours.resume else None
    if ours.resume:
        check_not_failed(arguments.output_dir, recipe)
    if checkpoint:
        check_checkpoint(checkpoint)
    if finished or checkpoint or (ours.resume and last_report(arguments.output_dir)):
        check_same_recipe(ours, arguments)
    if finished:
        counts = {name: finished[name] for name in ("steps", "epochs")}
        done = ", ".join(
            f"{round(count, 2):,.10g} {name.removesuffix('s') if count == 1 else name}"
            for name, count in counts.items()
        )
        logger.warning(
            f"{arguments.output_dir} is already trained ({done}): nothing to do. Choose another output_dir, "
            "or set resume: false."
        )
        return {**finished, "already_trained": True}
    if ours.metric != "loss":
        check_installed([ours.metric])
    check_replaceable(arguments.output_dir)
    if ours.resume and not checkpoint and last_report(arguments.output_dir):
        raise FileExistsError(
            f"{arguments.output_dir} holds a finished training, and no checkpoint to resume from. Choose another "
            "output_dir, or train from scratch with resume: false."
        )
    check_start_is_kept(ours, arguments)
    set_seed(arguments.seed)
    lines = progress_lines(arguments, quiet)
    with lines or nullcontext():
        return _train(ours, arguments, recipe, checkpoint, lines)


def _train(
    ours: Recipe,
    arguments: Seq2SeqTrainingArguments,
    recipe: Mapping[str, Any],
    checkpoint: str | None,
    lines: ProgressLines | None,
) -> dict[str, Any]:
    text_to_text = load_to_train(ours)
    use_cache = getattr(text_to_text.model.config, "use_cache", True)
    if text_to_text.is_llm2slm and not ours.include_llm:
        check_not_replaced(source_of_llm(text_to_text.model, ours), arguments.output_dir)
    trainer = make_trainer(ours, arguments, text_to_text)
    ProgressLines.replace_bar(trainer, lines)
    if trainer.is_world_process_zero():
        prepare_output_dir(ours, arguments)
        check_disk_space(arguments.output_dir, _bytes_to_write(ours, arguments, text_to_text.model))
    start = time.time()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.check_weights()
    except TrainingFailed as error:
        if trainer.is_world_process_zero():
            record_failure(arguments.output_dir, recipe, error)
        raise
    if ours.streaming and trainer.state.global_step == 0:  # no worker alone can know that all workers have no rows
        raise ValueError(f"{ours.train_data}: no row can be used, see the warnings. Take other data.")
    report = _report(recipe, trainer, time.time() - start, checkpoint)
    trained = gather_sharded(trainer, ours) if trainer.is_fsdp_enabled else text_to_text
    if trainer.is_world_process_zero() and trained is not None:
        _save(ours, arguments, trained, report, use_cache)
    trainer.accelerator.wait_for_everyone()
    return report


def _bytes_to_write(ours: Recipe, arguments: Seq2SeqTrainingArguments, model: Any) -> int:
    """Return the bytes that a training writes at least: the model and, if any are saved, one checkpoint."""
    parameters = dict(model.named_parameters())
    llm = sum(tensor.nbytes for name, tensor in parameters.items() if LLM_PREFIX in name)
    rest = sum(tensor.nbytes for tensor in parameters.values()) - llm
    trained = sum(tensor.nbytes for tensor in parameters.values() if tensor.requires_grad)
    checkpoint = trained if ours.lora is not None else rest + (llm if ours.include_llm_in_checkpoints else 0)
    if arguments.save_strategy == "no":
        checkpoint = 0
    elif ours.optimizer == "adamw" and arguments.optim.startswith("adamw_torch"):
        checkpoint += 2 * trained
    return rest + (llm if ours.include_llm else 0) + checkpoint


def make_trainer(ours: Recipe, arguments: Seq2SeqTrainingArguments, text_to_text: TextToText) -> TextToTextTrainer:
    """Return a Trainer for a model that [`load_to_train`] has loaded, with the data of a recipe."""
    if text_to_text.is_llm2slm:
        check_fusion(ours, arguments, text_to_text.model.config)
    data = training_data(ours, arguments, text_to_text)
    return TextToTextTrainer(
        text_to_text,
        data.validation_examples,
        ours.metric,
        ours.generation,
        ours.learning_rate_mapping,
        ours.optimizer,
        without_llm=bool(ours.llm_states or ours.quantize_llm) and ours.lora is None,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
    )


def check_fusion(ours: Recipe, arguments: Seq2SeqTrainingArguments, config: LLM2SLMConfig) -> None:
    """Raise `ValueError` for settings that the model's fusion cannot train with, before any data is read."""
    fusion = fusion_of(config)
    # Its name is new in transformers 5.23.
    if fusion.fills_cache and getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing):
        raise ValueError(
            f'Activation (gradient) checkpointing drops the cache that fusion "{fusion.name}" fills. Leave it out of '
            "the recipe."
        )
    if fusion.llm_has_head and ours.llm_states and ours.validation_data and ours.metric != "loss":
        raise ValueError(
            f"metric: {ours.metric} generates outputs, whose first token comes from the LLM, and llm_states loads "
            "none. Set metric: loss, and score the trained model with llm2slm evaluate."
        )


def _save(
    ours: Recipe,
    arguments: Seq2SeqTrainingArguments,
    trained: TextToText,
    report: dict[str, Any],
    use_cache: bool,
) -> None:
    """Save the trained model with its report, atomically."""
    with atomic_write(arguments.output_dir) as folder:
        whole = merge_and_restore(ours, trained, folder)
        report["parameters"]["total"] = whole.parameters()["total"]  # including the LLM that stored states replaced
        whole.model.config.use_cache = use_cache  # the Trainer turns it off
        options: dict[str, Any] = {}
        if whole.is_llm2slm:
            if not ours.include_llm:
                refer_to_llm(whole.model, ours)
            card = {"name": Path(arguments.output_dir).name, "training": report}
            options = {"include_llm": ours.include_llm, "card": card}
        whole.save_pretrained(folder, **options)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _report(
    recipe: Mapping[str, Any], trainer: TextToTextTrainer, seconds: float, resumed: str | None
) -> dict[str, Any]:
    model, state = trainer.text_to_text.model, trainer.state
    return {
        "recipe": without_secrets(recipe),
        "seconds": round(seconds, 1),
        "resumed_at_step": int(resumed.rpartition("-")[2]) if resumed else None,
        "steps": state.global_step,
        "epochs": state.epoch,
        "metric": trainer.metric,
        "best_metric": state.best_metric if state.best_global_step is not None else None,
        "best_step": state.best_global_step,
        "parameters": trainer.text_to_text.parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "log": state.log_history,
        "versions": versions(),
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
    }
