"""Training from a recipe: one YAML file, the same for an LLM, an SLM alone and an LLM-to-SLM composite."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import (
    Adafactor,
    HfArgumentParser,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from .checkpoint_llm2slm import describe_source, lean_source
from .data import load_pairs, versions, write_aside
from .evaluation import METRICS, score
from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .text_to_text import TextToText


@dataclass
class TrainingRecipe:
    """
    What to train on what. A recipe file also takes every field of [`~transformers.Seq2SeqTrainingArguments`].

    Args:
        model: The checkpoint to start from, as `llm2slm build` makes it: a folder or a name on the Hub.
        train_data: A file or a data set on the Hub, see [`load_pairs`].
        validation_data: The same, for choosing the best checkpoint. None trains without validation.
        prompt_column: The column that holds what the model reads.
        answer_column: The column that holds what the model shall write.
        train_samples: Train on this many pairs, from the top (default: all).
        validation_samples: Validate on this many pairs, from the top (default: all).
        prompt_max_length: Prompts are cut to this many tokens (default: never).
        answer_max_length: Answers are cut to this many tokens (default: never).
        optimizer: `"adamw"`, or `"adafactor"` with updates relative to each parameter, which a T5 needs from scratch.
        metric: What chooses the best checkpoint: `"loss"`, `"bleu"`, `"chrf"`, `"rouge1"`, `"rouge2"`, `"rougeL"` or
            `"exact_match"`; all but the loss are computed on generated answers.
        generation: Arguments of `generate()` for that, such as `{num_beams: 4, max_new_tokens: 64}`.
        resume: Continue from the last checkpoint in the output folder, if there is one.
        include_llm: Whether the trained composite holds its frozen LLM, or says where it is (a lean checkpoint).
        include_llm_in_checkpoints: The same for the checkpoints along the way.
    """

    model: str
    train_data: str
    validation_data: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    train_samples: int | None = None
    validation_samples: int | None = None
    prompt_max_length: int | None = None
    answer_max_length: int | None = None
    optimizer: str = field(default="adamw", metadata={"choices": ["adamw", "adafactor"]})
    metric: str = field(default="loss", metadata={"choices": ["loss", *METRICS]})
    generation: str = "{}"
    resume: bool = True
    include_llm: bool = True
    include_llm_in_checkpoints: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.generation_kwargs, dict):
            raise ValueError(f"generation is {self.generation!r}, but must map names to values: {{num_beams: 4}}.")

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """The arguments of `generate()` as a mapping."""
        return yaml.safe_load(self.generation)


# Defaults of ours where those of transformers would not validate, keep the best checkpoint, or stay off the network.
# Unused columns are dropped by the collator: the Trainer drops them before it looks for the lengths to group by.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_total_limit": 2,  # the best and the last
    "logging_steps": 50,
    "save_strategy": "epoch",
    "remove_unused_columns": False,
}
VALIDATION_DEFAULTS: dict[str, Any] = {"eval_strategy": "epoch", "load_best_model_at_end": True}


class _RecipeParser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"The recipe is wrong: {message.removeprefix('argument ')}.")


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Reads a recipe file and puts `overrides` over it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a YAML mapping.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no recipe {path}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe: it must map names to values, such as `model: path/to/checkpoint`.")
    return {**recipe, **(overrides or {})}


def parse_recipe(recipe: Mapping[str, Any]) -> tuple[TrainingRecipe, Seq2SeqTrainingArguments]:
    """
    Splits a flat recipe into our fields and those of the Trainer, with environment variables expanded.

    Raises:
        ValueError: If a key is unknown (the nearest known one is named), a required one is missing, a value is of the
            wrong type, or an environment variable is not set.
    """
    _check_keys(recipe)
    validation = VALIDATION_DEFAULTS if recipe.get("validation_data") else {}
    settings = {**DEFAULTS, **validation, **recipe}
    settings.setdefault("use_cpu", not torch.accelerator.is_available())  # without it, bf16 on a CPU is an error
    metric = settings.get("metric", "loss")
    if validation:
        settings.setdefault("metric_for_best_model", f"eval_{metric}")
        settings.setdefault("greater_is_better", metric != "loss")
    arguments: list[str] = []
    for name, value in settings.items():
        if value is not None:
            arguments += [f"--{name}", *_strings(value)]
    parser = _RecipeParser((TrainingRecipe, Seq2SeqTrainingArguments), allow_abbrev=False)
    ours, trainers = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return ours, trainers


def _check_keys(recipe: Mapping[str, Any]) -> None:
    known = [f.name for kind in (TrainingRecipe, Seq2SeqTrainingArguments) for f in fields(kind) if f.init]
    for name in recipe:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"A recipe has no field {name!r}.{hint}")
    for name in ("model", "train_data", "output_dir"):
        if not recipe.get(name):
            raise ValueError(f"The recipe names no {name}.")


def _strings(value: Any) -> list[str]:
    """The words that stand for a value on a command line."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [_expand(str(entry)) for entry in value]
    return [_expand(str(value))]


def _expand(text: str) -> str:
    expanded = os.path.expandvars(text)
    if "${" in expanded:
        name = expanded.partition("${")[2].partition("}")[0]
        raise ValueError(f"The recipe uses the environment variable {name}, which is not set.")
    return expanded


@dataclass
class _WithoutLength:
    """Keeps the column that batches are grouped by from the model."""

    collator: Any

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return self.collator([{name: row for name, row in one.items() if name != "length"} for one in features])


class TextToTextTrainer(Seq2SeqTrainer):
    """
    A [`~transformers.Seq2SeqTrainer`] that also scores generated answers, whatever the kind of model.

    Args:
        text_to_text: The model with its processor.
        validation_pairs: The pairs to generate answers for and to score them by, or None.
        metric: One of [`METRICS`], reported as `eval_<metric>`; `"loss"` generates nothing.
        generation: Arguments of `generate()`.
        kwargs: Arguments of the Trainer.
    """

    def __init__(
        self,
        text_to_text: TextToText,
        validation_pairs: Dataset | None = None,
        metric: str = "loss",
        generation: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(model=text_to_text.model, data_collator=_WithoutLength(text_to_text.collator), **kwargs)
        self.text_to_text = text_to_text
        self.validation_pairs = validation_pairs
        self.metric = metric
        self.generation = dict(generation or {})

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # Here and not in evaluate(), so that callbacks such as early stopping see the metric as well.
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.metric != "loss" and self.validation_pairs is not None:
            answers = self.text_to_text.generate(
                self.validation_pairs["prompt"][:], self.args.per_device_eval_batch_size, **self.generation
            )
            scores = score(answers, self.validation_pairs["answer"][:], [self.metric])
            output.metrics[f"{metric_key_prefix}_{self.metric}"] = scores[self.metric]
        return output


def train(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """
    Trains a model as a recipe says, and leaves the best one in `output_dir`.

    A run that was killed continues from its last complete checkpoint. Beside the model `training.json` tells the
    recipe, the metrics of every validation, the time taken and the versions used.

    Args:
        recipe: The fields of [`TrainingRecipe`] and of [`~transformers.Seq2SeqTrainingArguments`] in one mapping.

    Returns:
        What `training.json` holds.
    """
    ours, arguments = parse_recipe(recipe)
    set_seed(arguments.seed)
    text_to_text = TextToText.from_pretrained(
        ours.model, prompt_max_length=ours.prompt_max_length, answer_max_length=ours.answer_max_length
    )
    use_cache = getattr(text_to_text.model.config, "use_cache", True)
    composite = isinstance(text_to_text.model, LLM2SLMForConditionalGeneration)
    if composite:
        _place_llm(text_to_text.model, ours)
    trainer = _trainer(ours, arguments, text_to_text)
    checkpoint = last_checkpoint(arguments.output_dir) if ours.resume else None
    start = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    report = _report(recipe, trainer, time.time() - start, checkpoint)
    text_to_text.model.config.use_cache = use_cache  # the Trainer turns it off
    with write_aside(arguments.output_dir) as folder:
        card = {"name": Path(arguments.output_dir).name, "training": report}
        text_to_text.save_pretrained(folder, **({"include_llm": ours.include_llm, "card": card} if composite else {}))
        (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _place_llm(model: LLM2SLMForConditionalGeneration, ours: TrainingRecipe) -> None:
    """Has the Trainer save lean checkpoints. An LLM of unknown source is found in the checkpoint to start from."""
    model.include_llm = ours.include_llm_in_checkpoints or not model.config.freeze_llm
    if not (model.config.llm_source or {}).get("name_or_path"):
        model.config.llm_source = describe_source(ours.model)
    if not (model.include_llm and ours.include_llm):
        lean_source(model)  # what stands in the way of a lean checkpoint is said before the training


def _trainer(ours: TrainingRecipe, arguments: Seq2SeqTrainingArguments, text_to_text: TextToText) -> TextToTextTrainer:
    pairs = load_pairs(ours.train_data, ours.prompt_column, ours.answer_column, limit=ours.train_samples)
    validation_pairs = None
    if ours.validation_data:
        validation_pairs = load_pairs(
            ours.validation_data, ours.prompt_column, ours.answer_column, limit=ours.validation_samples
        )
    return TextToTextTrainer(
        text_to_text,
        validation_pairs,
        ours.metric,
        ours.generation_kwargs,
        args=arguments,
        train_dataset=_features(text_to_text, pairs),
        eval_dataset=None if validation_pairs is None else _features(text_to_text, validation_pairs),
        optimizers=(_adafactor(text_to_text.model, arguments) if ours.optimizer == "adafactor" else None, None),
    )


def _features(text_to_text: TextToText, pairs: Dataset) -> Dataset:
    features = text_to_text.features(pairs["prompt"][:], pairs["answer"][:])
    # For `train_sampling_strategy: group_by_length`: a pad in the answer costs more than one in the prompt.
    lengths = [len(labels) for labels in features["labels"]]
    return Dataset.from_dict({**features, "length": lengths})


def _adafactor(model: PreTrainedModel, arguments: Seq2SeqTrainingArguments) -> Adafactor:
    # Trainer's own `optim="adafactor"` sets scale_parameter=False: steps that are the same for an embedding and a
    # matrix, which a T5 does not learn from.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Adafactor(parameters, lr=arguments.learning_rate, scale_parameter=True, relative_step=False)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None."""
    complete = Path(output_dir).glob("checkpoint-*/trainer_state.json")  # the last file that the Trainer writes
    checkpoints = sorted(complete, key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return str(checkpoints[-1].parent) if checkpoints else None


def _report(
    recipe: Mapping[str, Any], trainer: TextToTextTrainer, seconds: float, resumed: str | None
) -> dict[str, Any]:
    model, state = trainer.text_to_text.model, trainer.state
    return {
        "recipe": dict(recipe),
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
