"""
Recipes: what to train on what, as one typed and validated schema.

The options of the command line and the reference pages are generated from it. The command line loads this file without
the package, which imports transformers: at its top it may import the standard library, pydantic, yaml and the settings
only.
"""

import logging
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from dataclasses import Field as DataclassField
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..settings import (
    EPOCHS,
    LENGTH,
    METRICS,
    PROCESSES,
    SEED,
    TARGET_LENGTH,
    GenerateArguments,
    check_generate_arguments,
    check_value,
    describe_type,
    has_type,
    shown,
    types_of,
    unknown_name,
)


if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments


logger = logging.getLogger(__name__)

DATA, MODEL, OPTIMIZATION, VALIDATION = "Data", "Model", "Optimization", "Validation"
EXAMPLES = {"generation": "{num_beams: 4}", "learning_rate_mapping": "{projector: 1e-3}", "lora": "{r: 8}"}


def _structure(value: Any) -> Any:
    """Return the list or mapping that a command line gives as text; other values as they are."""
    if not (isinstance(value, str) and value.strip().startswith(("{", "["))):
        return value
    from ..data.parsing import parse_yaml  # here, because the command line loads this file without the package

    try:
        return parse_yaml(value)
    except ValueError:
        return value  # its type is wrong, and the schema reports that


def _mapping(value: Any, info: ValidationInfo) -> Any:
    """Read a mapping that a command line gives as text."""
    mapping = _structure(value)
    if not isinstance(mapping, Mapping):
        example = EXAMPLES[info.field_name or ""]
        raise ValueError(f"{info.field_name} is {shown(value)}, but it must map names to values, such as {example}.")
    unnamed = next((key for key in mapping if not isinstance(key, str)), None)
    if unnamed is not None:
        raise ValueError(f"{info.field_name} has the name {shown(unnamed)}, but names must be texts.")
    return dict(mapping)


def _names(value: Any, info: ValidationInfo) -> Any:
    """Read names of columns: a list, or text such as `a, b` or `[a, b]`."""
    if not isinstance(value, str):
        return value
    if isinstance(names := _structure(value), list):
        return names
    if value.strip().startswith("["):
        raise ValueError(
            f"{info.field_name} is {shown(value)}, but it must be a name or a list, such as [target, llm_output]."
        )
    return [name.strip() for name in value.split(",")]


PYDANTIC_BOUNDS = {"minimum": "ge", "above": "gt", "below": "lt", "maximum": "le", "limit": "le"}


def _field(
    group: str,
    description: str,
    default: Any = ...,
    *,
    fixed: bool | Literal["streaming"] = False,
    speedup: bool = True,
    **bounds: Any,
) -> Any:
    """
    Declare a field.

    Args:
        group: The group of fields that it belongs to.
        description: What it does: the help text on the command line and in the reference.
        default: Its default; none for a required field.
        fixed: Whether a resumed run must keep it: always, never, or with `streaming`.
        speedup: Whether `llm2slm speedup` takes it; it sets the others itself, or has options of its own for them.
        bounds: Bounds, see [`check_value`], and arguments of [`pydantic.Field`].
    """
    extra: dict[str, Any] = {"group": group, "fixed": fixed, "speedup": speedup}
    bounds = {PYDANTIC_BOUNDS.get(name, name): bound for name, bound in bounds.items()}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Options = Annotated[dict[str, Any], BeforeValidator(_mapping)]
LearningRates = Annotated[dict[str, Rate], BeforeValidator(_mapping)]
Columns = Annotated[list[str], Field(min_length=1), BeforeValidator(_names)]
if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[("loss", *METRICS)]


class Recipe(BaseModel):
    """
    What to train on what.

    A recipe file also takes every field of [`~transformers.Seq2SeqTrainingArguments`], except those that have no
    effect here; these are refused with the field to use instead. [`parse_recipe`] reads both.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        str_min_length=1,
    )

    model: str = _field(
        MODEL,
        "Checkpoint to start from, as `llm2slm build` writes it: a folder, or a name on the Hub.",
        fixed=True,
        speedup=False,
    )
    train_data: str = _field(DATA, "Training data: a file, or a data set on the Hub.", fixed=True, speedup=False)
    validation_data: str | None = _field(
        DATA,
        "Validation data, which chooses the best checkpoint. Default: no validation.",
        None,
        fixed=True,
        speedup=False,
    )
    train_split: str = _field(
        DATA, "Split of `train_data` on the Hub; a file is one split.", "train", fixed=True, speedup=False
    )
    validation_split: str = _field(
        DATA, "Split of `validation_data` on the Hub.", "validation", fixed=True, speedup=False
    )
    prompt_column: str = _field(DATA, "Column that holds the prompts.", "prompt", fixed=True, speedup=False)
    target_column: Columns = _field(
        DATA,
        "Column that holds the targets. With a list, such as `[target, llm_output]`, every row gives one example for "
        "each column; validation uses the first.",
        ["target"],
        validation_alias=AliasChoices("target_column", "answer_column"),
        fixed=True,
        speedup=False,
    )
    train_samples: int | None = _field(
        DATA, "Train on this many rows, from the top. Default: all.", None, minimum=1, fixed=True
    )
    validation_samples: int | None = _field(
        DATA, "Validate on this many rows, from the top. Default: all.", None, minimum=1, fixed=True
    )
    prompt_max_length: int | None = _field(
        DATA, "Truncate prompts to this many tokens. Default: never.", None, fixed=True, **LENGTH
    )
    target_max_length: int | None = _field(
        DATA,
        "Truncate targets to this many tokens. Default: never.",
        None,
        validation_alias=AliasChoices("target_max_length", "answer_max_length"),
        fixed=True,
        **TARGET_LENGTH,
    )
    optimizer: Literal["adamw", "adafactor"] = _field(
        OPTIMIZATION,
        "`adamw`, or `adafactor` with updates relative to each parameter, which training a T5 from scratch needs.",
        "adamw",
        fixed=True,
    )
    metric: Metric = _field(
        VALIDATION,
        "Metric that chooses the best checkpoint. All except `loss` are computed on generated outputs.",
        "loss",
    )
    generation: Options = _field(
        VALIDATION,
        "Arguments of `generate()` for the metric, such as `{num_beams: 4, max_new_tokens: 64}`. Sampling needs "
        "`do_sample: true`.",
        {},
        fixed=True,
    )
    resume: bool = _field(
        OPTIMIZATION,
        "Resume from the last checkpoint in `output_dir`, if it has one; `false` removes the checkpoints there and "
        "trains from scratch.",
        True,
    )
    include_llm: bool = _field(
        MODEL, "Save the frozen LLM with the trained model; `false` saves a lean checkpoint, which refers to it.", True
    )
    include_llm_in_checkpoints: bool = _field(
        MODEL, "Save the frozen LLM with the checkpoints written during training.", False
    )
    llm_states: str | None = _field(
        MODEL,
        "Store of hidden states that `llm2slm encode` wrote for all prompts: training then loads no LLM.",
        None,
        speedup=False,
    )
    learning_rate_mapping: LearningRates = _field(
        OPTIMIZATION,
        "Regular expressions for parameter names, each with a learning rate that replaces `learning_rate`, such as "
        "`{projector: 1e-3}`.",
        {},
        fixed=True,
    )
    lora: Options | None = _field(
        MODEL,
        "Train the SLM with a LoRA adapter: arguments of `peft.LoraConfig`, such as `{r: 8}` or `{}`. The saved model "
        "has the adapter merged in; the adapter itself is saved in `adapter/`.",
        None,
        fixed=True,
    )
    quantize_llm: Literal["int8", "nf4"] | None = _field(
        MODEL,
        "Quantize the frozen LLM to 8 or 4 bits while the rest trains. The saved model has the original LLM.",
        None,
        fixed=True,
    )
    skip_bad_rows: bool = _field(
        DATA,
        "Skip rows that cannot be read, hold no text or are too long for the model, with a warning that lists them. "
        "Default: such a row is an error.",
        False,
    )
    streaming: bool = _field(
        DATA,
        "Read the training data while training, for data too large to index; needs `max_steps`.",
        False,
        fixed=True,
    )
    shuffle_buffer: int = _field(
        DATA, "Number of rows among which streaming shuffles.", 10_000, minimum=1, fixed="streaming"
    )
    preprocessing_num_workers: int | None = _field(
        DATA, "Processes that tokenize the data. Default: only the main one.", None, **PROCESSES
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` for a number, which pydantic takes as 1."""
        _refuse_switch(str(info.field_name), value, cls.__annotations__[info.field_name or ""])
        return value

    @field_validator("*")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Check what pydantic does not: characters, and numbers beyond 64 bits."""
        check_value(str(info.field_name), value, {})
        return value

    @field_validator("learning_rate_mapping")
    @classmethod
    def _check_patterns(cls, mapping: dict[str, float]) -> dict[str, float]:
        for pattern in mapping:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"learning_rate_mapping has {shown(pattern)}, which is not a regular expression: {error}."
                ) from None
        return mapping

    @model_validator(mode="after")
    def _check_llm(self) -> "Recipe":
        if self.llm_states and self.quantize_llm:
            raise ValueError("llm_states loads no LLM, so quantize_llm has no effect: leave out one of the two.")
        return self


class RecipeField(NamedTuple):
    """
    A field of a recipe, as the command line and the reference page show it.

    Args:
        name: Its name in snake_case.
        type: Its type as text, such as `int` or `adamw | adafactor`.
        default: Its default; `None` where there is none, or where it is decided at run time.
        description: What it does.
        group: The group of fields that it belongs to.
        required: Whether a recipe must have it.
        fixed: Whether a resumed run must keep it: `True`, `False`, or `"streaming"` for streamed data only.
        speedup: Whether `llm2slm speedup` takes it.
    """

    name: str
    type: str
    default: Any
    description: str
    group: str
    required: bool = False
    fixed: bool | Literal["streaming"] = False
    speedup: bool = True


def recipe_fields(trainer: bool = False) -> list[RecipeField]:
    """
    Return the fields of [`Recipe`]; with `trainer` those of [`~transformers.Seq2SeqTrainingArguments`] that a recipe
    takes, with the defaults that they have in recipes (this imports transformers).
    """
    if trainer:
        return _trainer_fields()
    return [
        RecipeField(
            name=name,
            type=_type_text(Recipe.__annotations__[name]),
            default=None if field.is_required() else field.default,
            description=field.description or "",
            required=field.is_required(),
            **field.json_schema_extra,  # type: ignore[arg-type]
        )
        for name, field in Recipe.model_fields.items()
    ]


def _trainer_fields() -> list[RecipeField]:
    from transformers import Seq2SeqTrainingArguments

    hints = get_type_hints(Seq2SeqTrainingArguments)
    return [
        RecipeField(
            name=field.name,
            type=_type_text(hints[field.name]),
            default=DEFAULTS.get(field.name, None if field.default is MISSING else field.default),
            description=" ".join(field.metadata.get("help", "").split()),
            group="Trainer",
            required=field.name in REQUIRED,
        )
        for field in fields(Seq2SeqTrainingArguments)
        if field.init and field.name not in REFUSED
    ]


def _type_text(kind: Any) -> str:
    """Return a type as a reader of a reference page knows it: `adamw | adafactor`, `int`, `mapping`."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _type_text(get_args(kind)[0])
    if origin is Literal:
        return " | ".join(map(str, get_args(kind)))
    if origin in (Union, types.UnionType):
        parts = [part for part in get_args(kind) if part is not type(None)]
        choices = [part for part in parts if _is_enum(part)]  # which the Trainer also takes as text
        return " | ".join(dict.fromkeys(map(_type_text, choices or parts)))
    if _is_enum(kind):
        return " | ".join(str(member.value) for member in kind)
    name = (origin or kind).__name__
    return {"dict": "mapping", "str": "text", "list": "list"}.get(name, name)


def _refuse_switch(name: str, value: Any, kind: Any) -> None:
    """Raise `ValueError` for a switch in place of a number: Python counts with switches."""
    if isinstance(value, bool) and has_type(1, kind) and not has_type(value, kind):
        raise ValueError(f"{name} is {str(value).lower()}, but it must be {describe_type(kind)}.")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


# Defaults that differ from those of transformers, so that a training keeps its best checkpoint, shows its progress and
# stays off the network. The collator drops unused columns: the Trainer would drop the lengths to group by.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_total_limit": 2,  # the best and the last
    "logging_steps": 50,
    "remove_unused_columns": False,
    "disable_tqdm": False,
    "logging_nan_inf_filter": False,  # it would leave losses that are not finite out of the validation loss
}
REQUIRED = ("model", "train_data", "output_dir")
STEPS_BETWEEN_CHECKPOINTS = 500  # in a stream, whose epochs do not end
BATCH, SPAN = {"minimum": 1, "limit": 2**31 - 1}, {"above": 0}
# Bounds of the Trainer's numbers, where they are other than finite and at least 0; choices are those of transformers.
TRAINER_BOUNDS: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH,
    "eval_accumulation_steps": BATCH,
    "torch_empty_cache_steps": BATCH,
    "num_train_epochs": EPOCHS,
    "max_steps": {**BATCH, "also": -1},
    "logging_steps": SPAN,
    "eval_steps": SPAN,
    "save_steps": SPAN,
    "save_total_limit": BATCH,
    "adam_beta1": {"minimum": 0, "below": 1},
    "adam_beta2": {"minimum": 0, "below": 1},
    "label_smoothing_factor": {"minimum": 0, "below": 1},
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": {**PROCESSES, "minimum": 0},
    "dataloader_prefetch_factor": PROCESSES,
    "ddp_bucket_cap_mb": BATCH,
    "ddp_timeout": {"minimum": 1, "limit": 10**9},
    "local_rank": {"minimum": 0, "also": -1},
}
LORA_BOUNDS: dict[str, dict[str, Any]] = {
    "r": {"minimum": 1, "limit": 2**16},
    "lora_alpha": {"above": 0},
    "lora_dropout": {"minimum": 0, "below": 1},
}
EMPTY = {
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
    "string_unicode": "text without halves of surrogate pairs",
}
# Fields of the Trainer that would have no effect, or another one than expected, each with what to do instead.
REFUSED = {
    "resume_from_checkpoint": "training resumes from the last checkpoint in output_dir; to start elsewhere, set model",
    "predict_with_generate": "training generates outputs where a metric, such as bleu, needs them",
    "generation_num_beams": "set generation: {num_beams: 4}",
    "generation_max_length": "set generation: {max_new_tokens: 64}",
    "generation_config": "set generation: {num_beams: 4}",
    "push_to_hub": "it would upload checkpoints and not the model; upload output_dir when training has finished",
}


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Read a recipe file and replace its fields by `overrides`.

    Args:
        path: A YAML file that maps names of fields, in snake_case or kebab-case, to values.
        overrides: Fields that take precedence over those of the file.

    Returns:
        The recipe with names in snake_case; its values are not checked yet, see [`parse_recipe`].

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a YAML mapping.
    """
    from ..data.parsing import read_yaml

    try:
        recipe = read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no recipe {path}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe: it must map names to values, such as `model: path/to/checkpoint`.")
    return {**with_current_names(recipe), **with_current_names(overrides or {})}


def with_current_names(recipe: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a recipe whose names are in snake_case and up to date, and whose paths are texts, as in a file."""
    current: dict[str, Any] = {}
    for name, value in recipe.items():
        key = str(name)[:100].replace("-", "_")
        key = FORMER_NAMES.get(key, key)
        if key in current:
            raise ValueError(f"The recipe sets {key} twice, under two spellings or names: leave out one of the two.")
        current[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return current


def typed_recipe(recipe: Mapping[Any, Any], ours: Recipe, arguments: "Seq2SeqTrainingArguments") -> dict[str, Any]:
    """
    Return a recipe with current names, whose numbers, switches, lists and mappings that a command line gave as text
    have their types.

    Args:
        recipe: The recipe.
        ours: Its fields, from [`parse_recipe`].
        arguments: Its fields of the Trainer, from [`parse_recipe`].
    """
    typed = with_current_names(recipe)
    for name, value in typed.items():
        if isinstance(value, str):
            parsed = getattr(ours if name in Recipe.model_fields else arguments, name)
            is_structure = isinstance(parsed, list | dict) and value.startswith(("{", "["))
            if is_structure or isinstance(parsed, bool | int | float):
                typed[name] = parsed
    return typed


FORMER_NAMES = {
    alias: name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.validation_alias, AliasChoices)
    for alias in field.validation_alias.choices
    if isinstance(alias, str) and alias != name
}


class RecipeError(ValueError):
    """A field of a recipe that is wrong. The message begins with its name, if one field alone is wrong."""


def parse_recipe(recipe: Mapping[str, Any]) -> "tuple[Recipe, Seq2SeqTrainingArguments]":
    """
    Split a flat recipe into our fields and those of the Trainer, and validate both.

    Environment variables in texts are expanded. `bf16` is left out, with a warning, on a CPU that would have to
    emulate it.

    Args:
        recipe: Fields of [`Recipe`] and of [`~transformers.Seq2SeqTrainingArguments`], with names in snake_case or
            kebab-case. `None` stands for a field's default.

    Raises:
        RecipeError: If a name is unknown (the error suggests the nearest one), a required field is missing, a value
            has the wrong type or is out of bounds, fields contradict each other, or an environment variable is not
            set.
    """
    try:
        return _parse(recipe)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _parse(recipe: Mapping[str, Any]) -> "tuple[Recipe, Seq2SeqTrainingArguments]":
    import torch

    from ..data.parsing import check_depth

    recipe = with_current_names(recipe)
    for name, value in recipe.items():
        try:
            check_depth(value)
        except ValueError as error:
            raise ValueError(f"{name} cannot be used: {error}.") from None
        for number in _integers(value):  # the larger ones cannot even be written as text
            check_value(name, number, {})
    _check_names(recipe)
    values = {name: _expanded(name, value) for name, value in recipe.items() if value is not None}
    try:
        ours = Recipe(**{name: value for name, value in values.items() if name in Recipe.model_fields})
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None
    _check_generation(ours.generation)
    if ours.lora is not None:
        ours = ours.model_copy(update={"lora": _lora_options(ours.lora)})
    theirs = {name: value for name, value in values.items() if name not in Recipe.model_fields}
    arguments = _training_arguments(ours, theirs)
    if arguments.bf16 and arguments.use_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2":
        # This CPU has no instructions for bfloat16: it emulates them, at a tenth of the speed of float32.
        logger.warning("bf16 is left out: this CPU has no instructions for it, and trains in float32 instead.")
        arguments = _training_arguments(ours, {**theirs, "bf16": False})
    _check_together(ours, arguments)
    return ours, arguments


def _check_names(recipe: Mapping[str, Any]) -> None:
    from transformers import Seq2SeqTrainingArguments

    known = [*Recipe.model_fields, *(field.name for field in fields(Seq2SeqTrainingArguments) if field.init)]
    for name in recipe:
        _check_name(name, known, "A recipe")
    for name in REQUIRED:
        if not recipe.get(name):
            raise ValueError(f"The recipe has no {name}: set it, such as {name}: path/to/{name}.")
    for name, instead in REFUSED.items():
        if str(recipe.get(name) or False).lower() != "false":
            raise ValueError(f"A recipe has no {name}: {instead}.")


def _check_name(name: str, known: Sequence[str], owner: str) -> None:
    if name not in known:
        raise ValueError(unknown_name(owner, name, known))


def _check_generation(generation: Mapping[str, Any]) -> None:
    known = {field.name: field.metadata for field in types_of(GenerateArguments)}
    for name in generation:
        _check_name(name, list(known), "generation")
    check_generate_arguments(generation, "generation.")
    for name, value in generation.items():
        if known[name].get("sampling") and value is not None and not generation.get("do_sample"):
            raise ValueError(f"generation.{name} needs sampling: add do_sample: true, or leave it out.")


def _lora_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `peft.LoraConfig` in the types that it declares, or raise `ValueError`."""
    from peft import LoraConfig, PeftConfig

    hints = get_type_hints(LoraConfig)
    known = [name for name in hints.keys() - get_type_hints(PeftConfig).keys() if not _needs_object(hints[name])]
    typed = {}
    for name, value in options.items():
        _check_name(name, sorted(known), "lora")
        kind = float if name == "lora_alpha" else hints[name]  # an integer there, but any number works
        typed[name] = _typed(f"lora.{name}", kind, value, LORA_BOUNDS.get(name, {"minimum": 0}))
    try:
        LoraConfig(**{"target_modules": ["all"], **typed})
    except Exception as error:  # each option raises its own exceptions
        raise ValueError(f"lora is {shown(options)}, which peft refuses: {cause_of(error)}.") from error
    return typed


def _needs_object(kind: Any) -> bool:
    """Return whether values of a type are objects of a dataclass, which no recipe can hold."""
    return all(part is types.NoneType or is_dataclass(part) for part in get_args(kind) or (kind,))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _integers(entry)
    elif isinstance(value, int):
        yield value


def _expanded(field: str, value: Any) -> Any:
    """Return a value with environment variables expanded, in texts and lists of texts."""
    if isinstance(value, list):
        return [_expanded(field, entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = os.path.expandvars(value)
    if "${" in text:
        name = text.partition("${")[2].partition("}")[0]
        raise ValueError(f"{field} uses the environment variable {shown(name)}, which is not set.")
    return text


def _training_arguments(ours: Recipe, values: Mapping[str, Any]) -> "Seq2SeqTrainingArguments":
    """Return the Trainer's fields as Python values, typed by its dataclass, with the defaults of recipes."""
    import torch
    from transformers import Seq2SeqTrainingArguments

    hints = get_type_hints(Seq2SeqTrainingArguments)
    declared = {field.name: field for field in fields(Seq2SeqTrainingArguments)}
    typed = {name: _typed(name, hints[name], value, _trainer_bounds(declared[name])) for name, value in values.items()}
    if ours.validation_data and typed.get("eval_strategy") == "no":
        raise ValueError("eval_strategy is 'no', but validation_data is set: remove one of them.")
    # Without use_cpu, the Trainer refuses bf16 on a CPU.
    defaults: dict[str, Any] = {**DEFAULTS, "use_cpu": not torch.accelerator.is_available()}
    if ours.validation_data:
        defaults |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{ours.metric}",
            "greater_is_better": ours.metric != "loss",
        }
    complete = {**defaults, **_checkpoint_times(ours, typed), **typed}
    try:
        return Seq2SeqTrainingArguments(**complete)
    except Exception as error:  # each field raises its own exceptions
        culprit = next((name for name in typed if _fails({**defaults, "output_dir": "x", name: typed[name]})), None)
        given = f"{culprit} is {shown(typed[culprit])}" if culprit else "The recipe has fields"
        raise ValueError(f"{given}, which the Trainer refuses: {cause_of(error)}.") from error


def _fails(values: Mapping[str, Any]) -> bool:
    """Return whether the Trainer refuses a field by itself."""
    from transformers import Seq2SeqTrainingArguments

    try:
        Seq2SeqTrainingArguments(**values)
    except Exception:  # each field raises its own exceptions
        return True
    return False


def cause_of(error: Exception) -> str:
    """Return what an exception of a library says, on one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300].removesuffix(".")


def _trainer_bounds(field: DataclassField[Any]) -> dict[str, Any]:
    """Return the bounds of a field of the Trainer."""
    choices = field.metadata.get("choices")
    return {**TRAINER_BOUNDS.get(field.name, {"minimum": 0}), **({"choices": tuple(choices)} if choices else {})}


def _typed(name: str, hint: Any, value: Any, bounds: Mapping[str, Any]) -> Any:
    """Return a value in the type that the dataclass of the Trainer, or of LoRA, declares, within its bounds."""
    _refuse_switch(name, value, hint)
    choices = [part for part in get_args(hint) if _is_enum(part)]
    value = _structure(value)
    adapter = TypeAdapter(
        choices[0] if choices else hint, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    )
    try:
        typed = adapter.validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(map(_wanted, error.errors())))
        raise ValueError(f"{name} is {shown(value)}, but it must be {wanted}.") from None
    check_value(name, typed, bounds)
    return typed


def _checkpoint_times(ours: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return when to save and to validate: at the same times, since only then the best checkpoint is known.

    If one of the two is set, the other follows it. Otherwise both happen by steps where steps are set or epochs do not
    end (streaming), and after each epoch elsewhere.
    """
    given = [values.get(name) for name in ("save_strategy", "eval_strategy")]
    steps = values.get("save_steps") or values.get("eval_steps")
    by_default = "steps" if steps or ours.streaming else "epoch"
    strategy = next((str(one.value) for one in given if one in ("steps", "epoch")), by_default)
    kinds = ("save", "eval") if ours.validation_data else ("save",)
    times: dict[str, Any] = {f"{kind}_strategy": strategy for kind in kinds}
    if strategy == "steps":
        times |= {f"{kind}_steps": steps or STEPS_BETWEEN_CHECKPOINTS for kind in kinds}
    return times


def _check_together(ours: Recipe, arguments: "Seq2SeqTrainingArguments") -> None:
    """Raise `ValueError` where fields contradict each other, or name what does not exist."""
    from accelerate.utils import DynamoBackend
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    backend, backends = arguments.torch_compile_backend, [one.value.lower() for one in DynamoBackend]
    if backend is not None and backend.lower() not in backends:
        raise ValueError(f"torch_compile_backend is {shown(backend)}, but it must be one of: {', '.join(backends)}.")
    known = {f"{prefix}{metric}" for prefix in ("", "eval_") for metric in ("loss", ours.metric)}
    if arguments.load_best_model_at_end and arguments.metric_for_best_model not in known:
        raise ValueError(
            f"metric_for_best_model is {shown(arguments.metric_for_best_model)}, but it must be one of: "
            f"{', '.join(sorted(known))}."
        )
    for name in arguments.report_to:
        _check_name(name, list(INTEGRATION_TO_CALLBACK), "report_to")
    if arguments.save_only_model and ours.resume:
        raise ValueError(
            "save_only_model saves nothing that training could resume from: set resume: false as well, or leave it "
            "out."
        )
    if not ours.streaming:
        return
    if arguments.max_steps < 1:
        raise ValueError("With streaming, the length of an epoch is unknown: set max_steps.")
    if arguments.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError("With streaming, train_sampling_strategy must be random or group_by_length.")
    arguments.accelerator_config.dispatch_batches = False  # batches of different lengths cannot be sent as one


def _sentence(error: ValidationError) -> str:
    """Return the first problem that pydantic found, as one sentence with the field, its value and what it may be."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    name, *keys = first["loc"]
    keys = [key for key in keys if isinstance(key, str | int)]
    given = f"has {shown(first['input'])} for {shown(keys[0])}" if keys else f"is {shown(first['input'])}"
    return f"{name} {given}, but it must be {_wanted(first)}."


def _wanted(problem: Mapping[str, Any]) -> str:
    """Return what pydantic wants of a value: `a valid integer`, `'adamw' or 'adafactor'`."""
    if problem["type"] in EMPTY:
        return EMPTY[problem["type"]]
    message = problem["msg"].removeprefix("Input should be ")
    return re.sub(r", (unable to|got a) .*", "", message).replace("dictionary", "mapping")
