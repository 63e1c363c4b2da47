"""
Recipes: what to train on what, as one typed and validated schema.

The options of the command line and the reference pages are generated from it. The command line loads this file without
the package, which imports transformers: at its top it may import the standard library, pydantic, yaml and the settings
only.
"""

import difflib
import logging
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ..settings import METRICS


if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments


logger = logging.getLogger(__name__)

DATA, MODEL, OPTIMIZATION, VALIDATION = "Data", "Model", "Optimization", "Validation"
EXAMPLES = {"generation": "{num_beams: 4}", "learning_rate_mapping": "{projector: 1e-3}", "lora": "{r: 8}"}


class _Loader(yaml.SafeLoader):
    """
    Reads numbers, switches and texts by YAML 1.2: `1e-3` and `012` are decimal numbers; `no`, `on`, `1:30` and
    `2026-01-31` are texts.
    """

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


_REPLACED = ("bool", "float", "int", "timestamp")
_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", "(?i:true|false)", "tTfF"),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+", "-+0123456789"),  # before float, which matches integers too
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds, by the rules of YAML 1.2; raise `yaml.YAMLError` if it is not YAML."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader


def _mapping(value: Any, info: ValidationInfo) -> Any:
    """Read a mapping that a command line gives as text."""
    mapping = value
    if isinstance(value, str):
        try:
            mapping = read_yaml(value)
        except yaml.YAMLError:
            mapping = None
    if not isinstance(mapping, Mapping):
        example = EXAMPLES[info.field_name or ""]
        raise ValueError(f"{info.field_name} is {value!r}, but it must map names to values, such as {example}.")
    return dict(mapping)


def _names(value: Any, info: ValidationInfo) -> Any:
    """Read names of columns: a list, or text such as `a, b` or `[a, b]`."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith("["):
        try:
            return read_yaml(value)
        except yaml.YAMLError:
            raise ValueError(
                f"{info.field_name} is {value!r}, but it must be a name or a list, such as [target, llm_output]."
            ) from None
    return [name.strip() for name in value.split(",")]


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
        bounds: Bounds and aliases, see [`pydantic.Field`].
    """
    extra: dict[str, Any] = {"group": group, "fixed": fixed, "speedup": speedup}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


Rate = Annotated[float, Field(allow_inf_nan=False)]
Options = Annotated[dict[str, Any], BeforeValidator(_mapping)]
LearningRates = Annotated[dict[str, Rate], BeforeValidator(_mapping)]
Columns = Annotated[list[str], BeforeValidator(_names)]
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
        extra="forbid", frozen=True, populate_by_name=True, coerce_numbers_to_str=True, protected_namespaces=()
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
        DATA, "Train on this many rows, from the top. Default: all.", None, ge=1, fixed=True
    )
    validation_samples: int | None = _field(
        DATA, "Validate on this many rows, from the top. Default: all.", None, ge=1, fixed=True
    )
    prompt_max_length: int | None = _field(
        DATA, "Truncate prompts to this many tokens. Default: never.", None, ge=1, fixed=True
    )
    target_max_length: int | None = _field(
        DATA,
        "Truncate targets to this many tokens. Default: never.",
        None,
        ge=2,
        validation_alias=AliasChoices("target_max_length", "answer_max_length"),
        fixed=True,
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
        DATA, "Number of rows among which streaming shuffles.", 10_000, ge=1, fixed="streaming"
    )
    preprocessing_num_workers: int | None = _field(
        DATA, "Processes that tokenize the data. Default: only the main one.", None, ge=1
    )

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
# Fields of the Trainer that would have no effect, or another one than expected, each with what to do instead.
REFUSED = {
    "resume_from_checkpoint": "training resumes from the last checkpoint in output_dir; to start elsewhere, set model",
    "predict_with_generate": "training generates outputs where a metric, such as bleu, needs them",
    "generation_num_beams": "set generation: {num_beams: 4}",
    "generation_max_length": "set generation: {max_new_tokens: 64}",
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
    from ..data.text import read_text

    try:
        recipe = read_yaml(read_text(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no recipe {path}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe: it must map names to values, such as `model: path/to/checkpoint`.")
    return {**with_current_names(recipe), **with_current_names(overrides or {})}


def with_current_names(recipe: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a recipe whose names are in snake_case and up to date, and whose paths are texts, as in a file."""
    current: dict[str, Any] = {}
    for name, value in recipe.items():
        key = str(name).replace("-", "_")
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


def parse_recipe(recipe: Mapping[str, Any]) -> "tuple[Recipe, Seq2SeqTrainingArguments]":
    """
    Split a flat recipe into our fields and those of the Trainer, and validate both.

    Environment variables in texts are expanded. `bf16` is left out, with a warning, on a CPU that would have to
    emulate it.

    Args:
        recipe: Fields of [`Recipe`] and of [`~transformers.Seq2SeqTrainingArguments`], with names in snake_case or
            kebab-case. `None` stands for a field's default.

    Raises:
        ValueError: If a name is unknown (the error suggests the nearest one), a required field is missing, a value has
            the wrong type or is out of bounds, fields contradict each other, or an environment variable is not set.
    """
    import torch
    from transformers import GenerationConfig

    recipe = with_current_names(recipe)
    _check_names(recipe)
    values = {name: _expanded(value) for name, value in recipe.items() if value is not None}
    try:
        ours = Recipe(**{name: value for name, value in values.items() if name in Recipe.model_fields})
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None
    for name in ours.generation:
        _check_name(name, list(vars(GenerationConfig())), "generation")
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
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{owner} has no field {name!r}.{hint}")


def _expanded(value: Any) -> Any:
    """Return a value with environment variables expanded, in texts and lists of texts."""
    if isinstance(value, list):
        return [_expanded(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = os.path.expandvars(value)
    if "${" in text:
        name = text.partition("${")[2].partition("}")[0]
        raise ValueError(f"The recipe uses the environment variable {name}, which is not set.")
    return text


def _training_arguments(ours: Recipe, values: Mapping[str, Any]) -> "Seq2SeqTrainingArguments":
    """Return the Trainer's fields as Python values, typed by its dataclass, with the defaults of recipes."""
    import torch
    from transformers import Seq2SeqTrainingArguments

    hints = get_type_hints(Seq2SeqTrainingArguments)
    typed = {name: _typed(name, hints[name], value) for name, value in values.items()}
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
    try:
        return Seq2SeqTrainingArguments(**{**defaults, **_checkpoint_times(ours, typed), **typed})
    except ValueError as error:
        raise ValueError(f"The recipe is wrong: {' '.join(str(error).split())}") from error


def _typed(name: str, hint: Any, value: Any) -> Any:
    """Return a value of a Trainer field in the type that its dataclass declares."""
    choices = [part for part in get_args(hint) if _is_enum(part)]
    if isinstance(value, str) and value.startswith(("{", "[")):  # a command line gives mappings and lists as text
        value = read_yaml(value)
    adapter = TypeAdapter(
        choices[0] if choices else hint, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    )
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(map(_wanted, error.errors())))
        raise ValueError(f"{name} is {value!r}, but it must be {wanted}.") from None


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
    """Raise `ValueError` where fields contradict each other."""
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
    given = f"has {first['input']!r} for {keys[0]!r}" if keys else f"is {first['input']!r}"
    return f"{name} {given}, but it must be {_wanted(first)}."


def _wanted(problem: Mapping[str, Any]) -> str:
    """Return what pydantic wants of a value: `a valid integer`, `'adamw' or 'adafactor'`."""
    message = problem["msg"].removeprefix("Input should be ")
    return re.sub(r", (unable to|got a) .*", "", message).replace("dictionary", "mapping")
