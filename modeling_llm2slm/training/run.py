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

from ..configuration_llm2slm import LLM2SLMConfig
from ..data.atomic import atomic_write, check_replaceable
from ..data.records import versions, without_secrets
from ..fusion_llm2slm import fusion_of
from ..inference.saving import check_not_replaced
from ..inference.text_to_text import TextToText
from .callbacks import ProgressLines, progress_lines
from .features import training_data
from .model import gather_sharded, load_to_train, merge_and_restore, refer_to_llm, source_of_llm
from .recipe import Recipe, parse_recipe, typed_recipe
from .resuming import (
    REPORT,
    check_same_recipe,
    check_start_is_kept,
    finished_report,
    last_checkpoint,
    prepare_output_dir,
)
from .trainer import TextToTextTrainer


logger = logging.getLogger(__name__)


def train(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """
    Train a model as a recipe says, and save the best one to `output_dir`.

    A run that was stopped resumes from its last complete checkpoint. The report in `training.json`, next to the model,
    holds the recipe, the metrics of every validation, the time taken and the versions used. Every 30 seconds a line of
    progress is printed to standard error, if that is not a terminal.

    Args:
        recipe: The fields of [`Recipe`] and of [`~transformers.Seq2SeqTrainingArguments`] in one mapping.

    Returns:
        The report; with `already_trained: True` if the run had finished before, and nothing was done.

    Raises:
        ValueError: If the recipe is wrong, its data has bad rows, or it differs from the one of the run to resume.
        OSError: If a model or data cannot be read, or a checkpoint cannot be written.
    """
    ours, arguments = parse_recipe(recipe)
    recipe = typed_recipe(recipe, ours, arguments)
    if "bf16" in recipe:
        recipe["bf16"] = arguments.bf16  # the report holds what was done
    finished = finished_report(arguments) if ours.resume else None
    checkpoint = last_checkpoint(arguments.output_dir) if ours.resume else None
    if finished or checkpoint:
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
    check_replaceable(arguments.output_dir)
    check_start_is_kept(ours, arguments)
    set_seed(arguments.seed)
    lines = progress_lines(arguments)
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
    start = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    if ours.streaming and trainer.state.global_step == 0:  # no worker alone can know that all workers have no rows
        raise ValueError(f"{ours.train_data}: no row can be used, see the warnings. Take other data.")
    report = _report(recipe, trainer, time.time() - start, checkpoint)
    trained = gather_sharded(trainer, ours) if trainer.is_fsdp_enabled else text_to_text
    if trainer.is_world_process_zero() and trained is not None:
        _save(ours, arguments, trained, report, use_cache)
    trainer.accelerator.wait_for_everyone()
    return report


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
        "best_metric": state.best_metric,
        "best_step": state.best_global_step,
        "parameters": trainer.text_to_text.parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "log": state.log_history,
        "versions": versions(),
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
    }
