"""Training from a recipe: one YAML file, the same for an LLM, an SLM alone and an LLM-to-SLM composite."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from ..data.files import atomic_write, check_replaceable, remove_unfinished
from ..data.loading import load_examples, report_bad_rows
from ..data.order import EpochSampler, lengths
from ..data.records import versions, without_secrets, write_json
from ..data.streaming import StreamedFeatures
from ..engines.quantization import QUANTIZATIONS, quantize_llm
from ..evaluation.metrics import METRICS, score
from ..inference.factory import describe_source
from ..inference.saving import check_not_replaced, lean_source
from ..inference.text_to_text import TextToText
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..states.store import StateStore
from ..states.without_llm import with_llm
from .adapters import lora_config
from .optimization import learning_rates, parameter_groups, relative_adafactor


FEATURES_VERSION = 2  # of what is kept on disk: another one for other features of the same pairs


@dataclass
class TrainingRecipe:
    """
    What to train on what. A recipe file also takes every field of [`~transformers.Seq2SeqTrainingArguments`], but for
    those that would do nothing here, which are refused with what to say instead.

    Args:
        model: The checkpoint to start from, as `llm2slm build` makes it: a folder or a name on the Hub.
        train_data: A file or a data set on the Hub, see [`load_examples`].
        validation_data: The same, for choosing the best checkpoint. None trains without validation.
        train_split: The split of `train_data`, where that is a data set on the Hub. A file is one split.
        validation_split: The same of `validation_data`.
        prompt_column: The column that holds what the model reads.
        target_column: The column that holds what the model shall write; of several (a list), such as the references
            and the LLM's answers of `llm2slm distill`, each gives every row a pair. Validation takes the first.
        train_samples: Train on this many rows, from the top (default: all).
        validation_samples: Validate on this many rows, from the top (default: all).
        prompt_max_length: Prompts are cut to this many tokens (default: never).
        target_max_length: Answers are cut to this many tokens (default: never).
        optimizer: `"adamw"`, or `"adafactor"` with updates relative to each parameter, which a T5 needs from scratch.
        metric: What chooses the best checkpoint: `"loss"`, `"bleu"`, `"chrf"`, `"rouge1"`, `"rouge2"`, `"rougeL"` or
            `"exact_match"`; all but the loss are computed on generated answers.
        generation: Arguments of `generate()` for that, such as `{num_beams: 4, max_new_tokens: 64}`; without
            `do_sample: true` nothing is sampled.
        resume: Continue from the last checkpoint in the output folder, if there is one; `False` removes those there.
        include_llm: Whether the trained composite holds its frozen LLM, or says where it is (a lean checkpoint).
        include_llm_in_checkpoints: The same for the checkpoints along the way.
        llm_states: A store of `llm2slm encode` that has all prompts: no LLM is loaded, its states are read.
        learning_rate_mapping: Regular expressions for parameter names, each with a rate that replaces `learning_rate`,
            such as `{projector: 1e-3}`; see [`parameter_groups`].
        lora: Arguments of [`lora_config`], such as `{r: 8}` or `{}`: the SLM trains through an adapter. The model in
            the output folder has it merged in, the adapter itself lies in `adapter/`.
        quantize_llm: `"int8"` or `"nf4"` keeps the frozen LLM's matrices in 8 or 4 bits while the rest trains, see
            [`quantize_llm`]. The model in the output folder has the LLM as it was.
        skip_bad_rows: Leave out rows that cannot be read, hold no text or are too long for the LLM or the SLM, with a
            warning that numbers them, in place of an error that does.
        streaming: Read the training data while training, for data that is not to be indexed; needs `max_steps`.
        shuffle_buffer: Rows that streaming shuffles among.
        preprocessing_num_workers: Processes that turn texts into token ids (default: this one).
    """

    model: str
    train_data: str
    validation_data: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    prompt_column: str = "prompt"
    target_column: str = "target"
    train_samples: int | None = None
    validation_samples: int | None = None
    prompt_max_length: int | None = None
    target_max_length: int | None = None
    optimizer: str = field(default="adamw", metadata={"choices": ["adamw", "adafactor"]})
    metric: str = field(default="loss", metadata={"choices": ["loss", *METRICS]})
    generation: str = "{}"
    resume: bool = True
    include_llm: bool = True
    include_llm_in_checkpoints: bool = False
    llm_states: str | None = None
    learning_rate_mapping: str = "{}"
    lora: str | None = None
    quantize_llm: str | None = field(default=None, metadata={"choices": list(QUANTIZATIONS)})
    skip_bad_rows: bool = False
    streaming: bool = False
    shuffle_buffer: int = 10_000
    preprocessing_num_workers: int | None = None

    def __post_init__(self) -> None:
        for name, example in _MAPPINGS.items():
            try:
                is_mapping = isinstance(self.mapping(name), dict)
            except yaml.YAMLError:
                is_mapping = False
            if not is_mapping:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must map names to values: {example}.")
        learning_rates(self.mapping("learning_rate_mapping"))
        for name in self.generation_kwargs:
            _check_name(name, list(vars(GenerationConfig())), "generation")
        if self.llm_states and self.quantize_llm:
            raise ValueError("With llm_states no LLM is loaded, so quantize_llm has nothing to do. Leave one out.")

    def mapping(self, name: str) -> dict[str, Any]:
        """A field whose value is a mapping; an empty one where it is not set."""
        mapping = yaml.safe_load(getattr(self, name) or "{}")
        if not isinstance(mapping, dict):
            return mapping
        return {key: float(value) if _EXPONENT.fullmatch(str(value)) else value for key, value in mapping.items()}

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """The arguments of `generate()` as a mapping."""
        return self.mapping("generation")

    @property
    def target_columns(self) -> list[str]:
        """The names of the columns that hold answers."""
        return [name.strip() for name in self.target_column.split(",")]


logger = logging.getLogger(__name__)

_EXPONENT = re.compile(r"[+-]?\d+\.?\d*[eE][+-]?\d+")  # is a number, which YAML has as a text

ROWS_AT_ONCE = 10_000  # are turned into token ids; texts that were cut are counted so often
_MAPPINGS = {"generation": "{num_beams: 4}", "learning_rate_mapping": "{projector: 1.0e-3}", "lora": "{r: 8}"}

# Defaults of ours where those of transformers would not validate, keep the best checkpoint, or stay off the network.
# Unused columns are dropped by the collator: the Trainer drops them before it looks for the lengths to group by.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_total_limit": 2,  # the best and the last
    "logging_steps": 50,
    "remove_unused_columns": False,
}
VALIDATION_DEFAULTS: dict[str, Any] = {"load_best_model_at_end": True}
# Fields of the Trainer that would do nothing, or something else than is hoped for.
_NOT_IN_RECIPES = {
    "resume_from_checkpoint": "it goes on from the last checkpoint in output_dir; to begin elsewhere, name a model",
    "predict_with_generate": "answers are generated where a metric, such as bleu, wants them",
    "generation_num_beams": "say generation: {num_beams: 4}",
    "generation_max_length": "say generation: {max_new_tokens: 64}",
    "push_to_hub": "checkpoints would go there, and not the model; upload output_dir when it is trained",
}
STEPS = 500  # between checkpoints where epochs do not end, in streams
# What a run that goes on has to have as it began: the optimizer, the schedule and the order of the data go by it, and
# the best checkpoint is found by it.
FIXED = (
    "model", "train_data", "train_split", "prompt_column", "target_column", "train_samples", "prompt_max_length",
    "target_max_length", "optimizer", "optim", "learning_rate", "learning_rate_mapping", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "label_smoothing_factor", "lora", "quantize_llm", "seed", "data_seed", "train_sampling_strategy",
    "streaming", "validation_data", "validation_split", "validation_samples", "metric_for_best_model", "generation",
    "save_only_model",
)  # fmt: skip
FIXED_IN_STREAMS = ("shuffle_buffer", "dataloader_num_workers")
RECIPE = "recipe.json"


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
    Splits a flat recipe into our fields and those of the Trainer, with environment variables expanded. `bf16` is left
    out, with a warning, on a CPU that would have to emulate it.

    Raises:
        ValueError: If a key is unknown (the nearest known one is named), a required one is missing, a value is of the
            wrong type, or an environment variable is not set.
    """
    _check_keys(recipe)
    validation = VALIDATION_DEFAULTS if recipe.get("validation_data") else {}
    settings = {**DEFAULTS, **_when(recipe, bool(validation)), **validation, **recipe}
    settings.setdefault("use_cpu", not torch.accelerator.is_available())  # without it, bf16 on a CPU is an error
    settings["target_column"] = _names(settings.get("target_column"))
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
    if trainers.bf16 and trainers.use_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2":
        # What a processor has no instructions for is emulated, at a tenth of the speed of float32.
        logger.warning("bf16 is left out: this CPU has no instructions for it, and trains in float32 instead.")
        return parse_recipe({**recipe, "bf16": False})
    if trainers.save_only_model and ours.resume:
        raise ValueError("save_only_model keeps nothing to go on from: say resume: false as well, or leave it out.")
    if ours.streaming:
        if trainers.max_steps < 1:
            raise ValueError("With streaming nobody knows how long an epoch is: say how long to train with max_steps.")
        if trainers.train_sampling_strategy not in ("random", "group_by_length"):
            raise ValueError("With streaming, train_sampling_strategy is random or group_by_length.")
        trainers.accelerator_config.dispatch_batches = False  # batches of different lengths cannot be sent as one
    return ours, trainers


def _when(recipe: Mapping[str, Any], validates: bool) -> dict[str, Any]:
    """
    When to save and to validate, which the best checkpoint is found by only if both are at once: as one of them says,
    else by steps where there are some or nothing else (a stream), else after each epoch.
    """
    said = [recipe.get(name) for name in ("save_strategy", "eval_strategy")]
    steps = recipe.get("save_steps") or recipe.get("eval_steps")
    by_steps = steps or str(recipe.get("streaming", False)).lower() == "true"
    strategy = next((one for one in said if one in ("steps", "epoch")), "steps" if by_steps else "epoch")
    names = ("save", "eval") if validates else ("save",)
    defaults = {f"{name}_strategy": strategy for name in names}
    return defaults | ({f"{name}_steps": steps or STEPS for name in names} if strategy == "steps" else {})


def _names(columns: Any) -> Any:
    """Names of columns, a list or one as a command line has it, with commas in between."""
    if isinstance(columns, str) and columns.strip().startswith("["):
        try:
            columns = yaml.safe_load(columns)
        except yaml.YAMLError:
            raise ValueError(f"target_column is {columns!r}, which is no list: [target, llm_output].") from None
    return ",".join(map(str, columns)) if isinstance(columns, list) else columns


def _check_keys(recipe: Mapping[str, Any]) -> None:
    known = [f.name for kind in (TrainingRecipe, Seq2SeqTrainingArguments) for f in fields(kind) if f.init]
    for name in recipe:
        _check_name(name, known, "A recipe")
    for name in ("model", "train_data", "output_dir"):
        if not recipe.get(name):
            raise ValueError(f"The recipe names no {name}.")
    for name, instead in _NOT_IN_RECIPES.items():
        if str(recipe.get(name) or False).lower() != "false":
            raise ValueError(f"A recipe has no {name}: {instead}.")


def _check_name(name: Any, known: Sequence[str], whose: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{whose} has no field {name!r}.{hint}")


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


class _LogWhenSaved(TrainerCallback):
    """Logs the loss with every checkpoint, as the sum since the last log is not in it: a resumed run logs the same."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


@dataclass
class _SetEpoch(TrainerCallback):
    """Tells the sampler the epoch: through the wrappers of a resumed run on several devices it is not told."""

    sampler: EpochSampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class TextToTextTrainer(Seq2SeqTrainer):
    """
    A [`~transformers.Seq2SeqTrainer`] that also scores generated answers, whatever the kind of model.

    Args:
        text_to_text: The model with its processor.
        validation_pairs: The pairs to generate answers for and to score them by, or None.
        metric: One of [`METRICS`], reported as `eval_<metric>`; `"loss"` generates nothing.
        generation: Arguments of `generate()`; without `do_sample` nothing is sampled.
        learning_rate_mapping: See [`parameter_groups`].
        optimizer: `"adafactor"` for [`relative_adafactor`]; `"adamw"` leaves the choice to `args.optim`.
        without_llm: Leave the LLM out of checkpoints: they are there to go on from.
        kwargs: Arguments of the Trainer.
    """

    optimizer: Any  # its type is not found in transformers

    def __init__(
        self,
        text_to_text: TextToText,
        validation_pairs: Dataset | None = None,
        metric: str = "loss",
        generation: Mapping[str, Any] | None = None,
        learning_rate_mapping: Mapping[str, float] | None = None,
        optimizer: str = "adamw",
        without_llm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model=text_to_text.model, data_collator=_WithoutLength(text_to_text.collator), **kwargs)
        self.text_to_text = text_to_text
        self.validation_pairs = validation_pairs
        self.metric = metric
        self.generation = {"do_sample": False, **(generation or {})}
        self.learning_rate_mapping = dict(learning_rate_mapping or {})
        self.optimizer_name = optimizer
        self.without_llm = without_llm
        self.add_callback(_LogWhenSaved())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None and self.without_llm:
            state = self.model.state_dict()
            state_dict = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.llm.")}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # of `torch.save`, which has no other error for a full disk
                raise
            raise OSError(
                f"A checkpoint cannot be written to {self.args.output_dir}; its disk may be full. Make room, and "
                "repeat the command, which goes on from the last complete checkpoint."
            ) from error

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trained, args = self.model if model is None else model, self.args
        relative = self.optimizer_name == "adafactor"
        if self.optimizer is None and (relative or self.learning_rate_mapping):
            groups = parameter_groups(trained, args.learning_rate, self.learning_rate_mapping, args.weight_decay)
            if relative:
                self.optimizer = relative_adafactor(groups)
            else:
                optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(args, trained)
                self.optimizer = optimizer_class(groups, **kwargs)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Stock samplers draw from generators whose state a resumed epoch does not find again in every setting, and the
        # one that groups by length sorts within its groups: long rows before short ones, again and again.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        grouped = strategy == "group_by_length"
        sampler = EpochSampler(
            len(dataset),
            seed_of_data(self.args),
            torch.tensor(dataset["length"][:]) if grouped else None,
            pairs_a_step(self.args),
        )
        self.add_callback(_SetEpoch(sampler))
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step, it would take one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # Here and not in evaluate(), so that callbacks such as early stopping see the metric as well.
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.metric != "loss" and self.validation_pairs is not None:
            answers = self._generate(self.validation_pairs["prompt"][:])
            scores = score(answers, self.validation_pairs["target"][:], [self.metric])
            output.metrics[f"{metric_key_prefix}_{self.metric}"] = scores[self.metric]
        return output

    def _generate(self, prompts: list[str]) -> list[str]:
        """The answers to prompts; each process writes its share, unless a sharded model needs all at every step."""
        rank, world = self.args.process_index, self.args.world_size
        batch_size = self.args.per_device_eval_batch_size
        if world == 1 or self.is_fsdp_enabled:
            return self.text_to_text.generate(prompts, batch_size, **self.generation)
        from accelerate.utils import gather_object

        share = range(rank, len(prompts), world)
        answers = self.text_to_text.generate([prompts[index] for index in share], batch_size, **self.generation)
        return [answer for _, answer in sorted(gather_object(list(zip(share, answers, strict=True))))]


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
    if "bf16" in recipe:
        recipe = {**recipe, "bf16": arguments.bf16}  # the record tells what was done
    finished = _finished(arguments) if ours.resume else None
    checkpoint = last_checkpoint(arguments.output_dir) if ours.resume else None
    if finished or checkpoint:
        _check_begun(ours, arguments)
    if finished:
        logger.warning(f"{arguments.output_dir} is trained already, for max_steps: nothing is done.")
        return finished
    removed = Path(arguments.output_dir).resolve().glob("checkpoint-*") if not ours.resume else []
    if any(Path(ours.model).resolve().is_relative_to(folder) for folder in removed):
        raise ValueError(f"resume: false removes {ours.model}, which the training starts from: move it elsewhere.")
    set_seed(arguments.seed)
    text_to_text = _load(ours)
    use_cache = getattr(text_to_text.model.config, "use_cache", True)
    composite = text_to_text.model.config.model_type == "llm2slm"
    if composite and not ours.include_llm:
        check_not_replaced(_source_of_llm(text_to_text.model, ours), arguments.output_dir)
    trainer = _trainer(ours, arguments, text_to_text)
    if trainer.is_world_process_zero():
        _make_room(Path(arguments.output_dir), anew=not ours.resume)
        write_json(Path(arguments.output_dir) / RECIPE, _fixed(ours, arguments))
    start = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    if ours.streaming and trainer.state.global_step == 0:  # of several workers, none alone knows that all have no rows
        raise ValueError(f"{ours.train_data}: no row can be used, see the warnings. Take other data.")
    report = _report(recipe, trainer, time.time() - start, checkpoint)
    if report["steps"] == report["resumed_at_step"]:  # a finished run, repeated: the time is that of the first
        before = _last_report(arguments)
        report |= {name: before[name] for name in ("seconds", "resumed_at_step") if name in before}
    trained = _gathered(trainer, ours) if trainer.is_fsdp_enabled else text_to_text
    if trainer.is_world_process_zero() and trained is not None:
        with atomic_write(arguments.output_dir) as folder:
            whole = _whole(ours, trained, folder)
            report["parameters"]["total"] = whole.parameters()["total"]  # with the LLM that stored states stood for
            whole.model.config.use_cache = use_cache  # the Trainer turns it off
            if composite and not ours.include_llm:
                _place_llm(whole.model, ours)
            card = {"name": Path(arguments.output_dir).name, "training": report}
            whole.save_pretrained(folder, **({"include_llm": ours.include_llm, "card": card} if composite else {}))
            (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return report


def _make_room(output_dir: Path, anew: bool) -> None:
    """Removes what killed runs left half written, and of a run that begins `anew` what the one before it has left."""
    check_replaceable(output_dir)
    remove_unfinished(output_dir)
    remove_unfinished(output_dir / "checkpoint-*")
    if anew:
        (output_dir / "training.json").unlink(missing_ok=True)
        for checkpoint in output_dir.glob("checkpoint-*"):
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)  # without it, it is none to go on from
            shutil.rmtree(checkpoint)


def _fixed(ours: TrainingRecipe, arguments: Seq2SeqTrainingArguments) -> dict[str, Any]:
    """What of a recipe stays as it is while a run goes on. A model and data that were moved are the same."""
    names = (*FIXED, *(FIXED_IN_STREAMS if ours.streaming else ()))
    settings = {name: getattr(ours if hasattr(ours, name) else arguments, name) for name in names}
    settings |= {name: ours.mapping(name) for name in _MAPPINGS if settings[name] is not None}
    settings |= {name: Path(settings[name] or "").name for name in ("model", "train_data", "validation_data")}
    settings["pairs a step"] = pairs_a_step(arguments)
    if ours.streaming and arguments.dataloader_num_workers > 1:  # which give batches by turns
        settings["per_device_train_batch_size"] = arguments.per_device_train_batch_size
    if Path(ours.train_data).is_file() and not ours.streaming:
        settings["bytes of train_data"] = Path(ours.train_data).stat().st_size
    return json.loads(json.dumps(settings, default=str))


def seed_of_data(arguments: TrainingArguments) -> int:
    """The seed of the order of the data."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def pairs_a_step(arguments: TrainingArguments) -> int:
    """The number of pairs that the optimizer takes a step on, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def _check_begun(ours: TrainingRecipe, arguments: Seq2SeqTrainingArguments) -> None:
    """Raises `ValueError` where the run in the output folder, which is to go on, was begun by another recipe."""
    file = Path(arguments.output_dir) / RECIPE
    if not (file.is_file() and _is_json(file)):
        return
    begun, now = json.loads(file.read_text(encoding="utf-8")), _fixed(ours, arguments)
    for name in now:
        if name in begun and begun[name] != now[name]:
            raise ValueError(
                f"{arguments.output_dir} was begun with {name}: {begun[name]}, and cannot go on with {now[name]}. "
                "Put it back, choose another output_dir, or begin anew with resume: false."
            )


def _place_llm(model: LLM2SLMForConditionalGeneration, ours: TrainingRecipe) -> None:
    """Has the Trainer save lean checkpoints. An LLM of unknown source is found in the checkpoint to start from."""
    if not ours.quantize_llm and ours.lora is None:  # else the Trainer's checkpoints have no LLM in them anyway
        model.include_llm = ours.include_llm_in_checkpoints or not model.config.freeze_llm
    model.config.llm_source = _source_of_llm(model, ours)
    if not (model.include_llm and ours.include_llm):
        lean_source(model)  # what stands in the way of a lean checkpoint is said before the training


def _source_of_llm(model: Any, ours: TrainingRecipe) -> dict[str, Any] | None:
    """Where the LLM is: as the model says, unless that is no folder here, or in what the training starts from."""
    name = (model.config.llm_source or {}).get("name_or_path")
    gone = not name or (os.path.isabs(name) and not os.path.isdir(name))
    return describe_source(ours.model) if gone else model.config.llm_source


def _load(ours: TrainingRecipe) -> TextToText:
    """The model that a recipe starts from, as it trains: without its LLM, with an adapter, or as it is."""
    text_to_text = TextToText.from_pretrained(
        ours.model,
        prompt_max_length=ours.prompt_max_length,
        target_max_length=ours.target_max_length,
        states=StateStore(ours.llm_states) if ours.llm_states else None,
        keep_llm_dtype=True,
    )
    model = text_to_text.model
    if (ours.lora is not None or ours.quantize_llm) and not isinstance(model, LLM2SLMForConditionalGeneration):
        raise ValueError(f"{ours.model} is no LLM-to-SLM model; only one of these has lora and quantize_llm.")
    if isinstance(model, LLM2SLMForConditionalGeneration) and not ours.llm_states:
        _place_llm(model, ours)  # while the LLM is as it was
    if ours.quantize_llm:
        quantize_llm(model, ours.quantize_llm)
    if ours.lora is not None:
        from peft import get_peft_model

        try:
            config = lora_config(model, **ours.mapping("lora"))
        except TypeError as error:
            raise ValueError(f"lora has a field that peft's LoraConfig does not know: {error}.") from error
        text_to_text.model = get_peft_model(model, config)
    return text_to_text


def _gathered(trainer: TextToTextTrainer, ours: TrainingRecipe) -> TextToText | None:
    """A whole model with the weights of a sharded one, which all processes have to give, on the first of them."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    gathered = _load(ours)
    gathered.model.load_state_dict(state)
    return gathered


def _whole(ours: TrainingRecipe, text_to_text: TextToText, folder: Path) -> TextToText:
    """What was trained as one plain model: adapter merged in (and saved beside), the LLM back as it was."""
    model = text_to_text.model
    if ours.lora is not None:
        model.save_pretrained(folder / "adapter")
        model = model.merge_and_unload()
    if ours.llm_states or ours.quantize_llm:
        model = with_llm(model, ours.model, dtype=model.dtype, encoder_dtype=model.config.encoder_dtype)
    text_to_text.model = model
    return text_to_text


def _trainer(ours: TrainingRecipe, arguments: Seq2SeqTrainingArguments, text_to_text: TextToText) -> TextToTextTrainer:
    with arguments.main_process_first(desc="reading data"):
        validation_pairs = validation_features = None
        if ours.validation_data:
            validation_pairs, validation_features = _features(
                ours, text_to_text, ours.validation_data, ours.validation_split, ours.target_columns[:1],
                ours.validation_samples, ours.metric != "loss",
            )  # fmt: skip
        if ours.streaming:
            train_features: Any = _stream(ours, arguments, text_to_text)
        else:
            _, train_features = _features(
                ours, text_to_text, ours.train_data, ours.train_split, ours.target_columns, ours.train_samples
            )
    return TextToTextTrainer(
        text_to_text,
        validation_pairs,
        ours.metric,
        ours.generation_kwargs,
        ours.mapping("learning_rate_mapping"),
        ours.optimizer,
        without_llm=bool(ours.llm_states or ours.quantize_llm) and ours.lora is None,
        args=arguments,
        train_dataset=train_features,
        eval_dataset=validation_features,
    )


def _features(
    ours: TrainingRecipe,
    text_to_text: TextToText,
    source: str,
    split: str,
    target_columns: list[str],
    limit: int | None,
    answered: bool = False,
) -> tuple[Dataset, Dataset]:
    """
    Pairs and their features, both kept on disk by `datasets`, without those that the model has no room for: of prompts
    and answers, or of the answers that it may write if prompts are `answered`.
    """
    pairs = load_examples(
        source, ours.prompt_column, target_columns, split=split, limit=limit, skip_bad_rows=ours.skip_bad_rows,
        number_rows=True,
    )  # fmt: skip

    reader = text_to_text.without_model()

    def features(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = reader.features(rows["prompt"], rows["target"])
        return {
            **found,
            "length": lengths(found),  # for `train_sampling_strategy: group_by_length`
            "problem": [problem or "" for problem in reader.problems(found)],
        }

    dataset = pairs.map(
        features,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=pairs.column_names,
        num_proc=ours.preprocessing_num_workers,
        new_fingerprint=Hasher.hash([pairs._fingerprint, text_to_text.fingerprint(), FEATURES_VERSION]),
    )
    problems = {index: problem for index, problem in enumerate(dataset["problem"]) if problem}
    if answered:
        longest = text_to_text.with_limit(ours.generation_kwargs).get("max_new_tokens", 0)
        for index, ids in enumerate(text_to_text.features(pairs["prompt"][:])["input_ids"]):
            if problem := text_to_text.position_problem(len(ids), longest):
                problems.setdefault(index, f"has no room for an answer: {problem}")
        problems = dict(sorted(problems.items()))
    if problems:
        rows = {pairs[index]["row"]: problem for index, problem in problems.items()}
        report_bad_rows(source, {row: f"row {row} {problem}" for row, problem in rows.items()}, ours.skip_bad_rows)
        kept = [index for index in range(len(pairs)) if index not in problems]
        if not kept:
            raise ValueError(f"{source}: no row can be used, as row {min(rows)} {rows[min(rows)]}. Take other data.")
        pairs, dataset = pairs.select(kept), dataset.select(kept)
    return pairs, dataset.remove_columns("problem")


def _stream(ours: TrainingRecipe, arguments: Seq2SeqTrainingArguments, text_to_text: TextToText) -> StreamedFeatures:
    reader = text_to_text.without_model()
    return StreamedFeatures(
        ours.train_data,
        ours.prompt_column,
        ours.target_columns,
        reader.features,
        reader.problems,
        split=ours.train_split,
        batch_size=pairs_a_step(arguments),
        buffer=ours.shuffle_buffer,
        group_by_length=arguments.train_sampling_strategy == "group_by_length",
        seed=seed_of_data(arguments),
        limit=ours.train_samples,
        skip_bad_rows=ours.skip_bad_rows,
    )


def _finished(arguments: Seq2SeqTrainingArguments) -> dict[str, Any] | None:
    """The report of a run that has had its `max_steps`: the Trainer would take one more from its last checkpoint."""
    report = _last_report(arguments)
    return report if report.get("steps", 0) >= arguments.max_steps > 0 else None


def _last_report(arguments: Seq2SeqTrainingArguments) -> dict[str, Any]:
    """The report that lies in the output folder, or an empty one."""
    file = Path(arguments.output_dir) / "training.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() and _is_json(file) else {}


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None."""
    # The last file that the Trainer writes, and not in one stroke.
    states = [path for path in Path(output_dir).glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    checkpoints = sorted(states, key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return str(checkpoints[-1].parent) if checkpoints else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


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
