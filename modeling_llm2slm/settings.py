"""
Settings of everything that a command does, each declared once: its name, type, default, bounds and help text.

Library functions take these classes; the command line and the reference pages are generated from them. The command
line loads this file without the package, which imports transformers: it may import the standard library only.
"""

from __future__ import annotations

import os
import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


LARGEST_INTEGER = 2**63 - 1  # tensors hold 64 bits
Bounds = dict[str, Any]

# Bounds and patterns that several settings share, also those of recipes and of HTTP requests.
BEAMS: Bounds = {"minimum": 1, "limit": 1024}
LENGTH: Bounds = {"minimum": 1, "limit": 2**31 - 1}
TARGET_LENGTH: Bounds = {**LENGTH, "minimum": 2}  # the end token is one of them
OUTPUT_LENGTH: Bounds = {"minimum": 1, "limit": 2**20}  # beam search allocates all of it
TEMPERATURE: Bounds = {"minimum": 0.001, "maximum": 100}  # below, logits overflow when they are divided by it
TOP_P: Bounds = {"above": 0, "maximum": 1}
SEED: Bounds = {"minimum": 0, "limit": 2**32 - 1}  # NumPy accepts no other seeds
PROCESSES: Bounds = {"minimum": 1, "limit": 1024}
PENALTY: Bounds = {"minimum": 0.001, "maximum": 1000}
EPOCHS: Bounds = {"above": 0, "limit": 10**6}
WAIT: Bounds = {"limit": 10**9}  # timers overflow beyond it
DEVICE: Bounds = {"pattern": (r"[a-z]+(:\d{1,4})?", "a device such as cpu, cuda or cuda:1")}
ORIGIN: Bounds = {"pattern": (r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", "* or an origin such as https://example.org")}
FILE_SIZE: Bounds = {"pattern": (r"\d*[1-9]\d{0,9} *[KMGT]?B", "a size such as 500MB or 1GB")}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """
    Declare a setting. Its annotation is its type.

    Args:
        default: Its default; `None` where it is decided at run time, `MISSING` for a required setting.
        help: One line: the help text on the command line and in the reference.
        metadata: The bounds of [`check_value`], `panel` (the group of options in the help) and `cli=False` (not on the
            command line).
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    Base of all settings: checks types, bounds and choices when it is created, and raises `ValueError` with the field.
    """

    def __post_init__(self) -> None:
        for setting, kind in types_of(type(self)).items():  # type: ignore[arg-type] # classes are hashable
            value = getattr(self, setting.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, setting.name, value)
            check_value(setting.name, value, setting.metadata, kind)


@cache
def types_of(settings: type[Settings]) -> dict[Any, Any]:
    """Return the type of each field of a settings class."""
    hints = get_type_hints(settings)
    return {setting: hints[setting.name] for setting in fields(settings)}


def check_value(name: str, value: Any, bounds: Mapping[str, Any], kind: Any = Any) -> None:
    """
    Raise `ValueError` where a value has another type than `kind`, or is outside its bounds.

    Args:
        name: The name of the setting.
        value: Its value. `None` stands for the default where the type includes it.
        bounds: `minimum` and `maximum` (inclusive), `above` and `below` (exclusive), `limit` (a technical maximum,
            which the help leaves out), `also` (a number outside them that has a meaning of its own), `choices`, and
            `pattern` (a regular expression, and a description of it). Other keys are ignored. Any number must be
            finite, and an integer must fit 64 bits.
        kind: A type hint: numbers, `bool`, `str`, literals, lists and mappings of these, and unions.
    """
    if value is None and has_type(None, kind):
        return
    wanted = next(_unmet(value, bounds, kind), None)
    if wanted is not None:
        raise ValueError(f"{name} is {shown(value)}, but it must be {wanted}.")


def _unmet(value: Any, bounds: Mapping[str, Any], kind: Any) -> Any:
    """Yield what a value must be and is not."""
    if not has_type(value, kind):
        yield describe_type(kind)
    choices, pattern = bounds.get("choices"), bounds.get("pattern")
    if choices is not None and value not in choices:
        yield f"one of: {', '.join(map(str, choices))}"
    if isinstance(value, str):
        if "\0" in value or not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            yield "text without NUL characters and halves of surrogate pairs"
        if pattern is not None and not re.fullmatch(pattern[0], value):
            yield pattern[1]
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _unmet(entry, bounds, Any)
    if has_type(value, float):
        yield from _unmet_bounds(value, bounds)


def _unmet_bounds(value: Any, bounds: Mapping[str, Any]) -> Any:
    tests: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "above": ("above", lambda bound: value > bound),
        "minimum": ("at least", lambda bound: value >= bound),
        "below": ("below", lambda bound: value < bound),
        "maximum": ("at most", lambda bound: value <= bound),
        "limit": ("at most", lambda bound: value <= bound),
    }
    for bound, (words, holds) in tests.items():
        if bound in bounds and value != bounds.get("also") and not holds(bounds[bound]):  # NaN fails every comparison
            also = f", or {bounds['also']}" if "also" in bounds else ""
            yield f"{words} {bounds[bound]}{also}"
    if has_type(value, int):
        if not -LARGEST_INTEGER - 1 <= value <= LARGEST_INTEGER:
            yield "a whole number of at most 64 bits"
    elif not abs(value) <= sys.float_info.max:
        yield "a finite number"


def has_type(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, see [`check_value`]. `True` is not a number."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return has_type(value, arguments[0])
    if origin in (Union, UnionType):
        return any(has_type(value, part) for part in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (list, tuple):
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_list and all(has_type(entry, arguments[0]) for entry in value)
    number = {int: Integral, float: Real}.get(kind)
    if number is not None:
        return isinstance(value, number) and not isinstance(value, bool)
    return kind is Any or isinstance(value, origin or kind)


def describe_type(kind: Any) -> str:
    """Return a type in words: `a whole number`, `text`, `true or false`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return f"a list with {describe_type(arguments[0])} in each place"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a mapping of names to values")


class _Shortened(reprlib.Repr):
    """Shows values of any size and depth in a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 35
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 128 else repr(x)


def shown(value: Any) -> str:
    """Return a value as error messages show it, shortened if it is long."""
    return _Shortened().repr(value)


def unknown_name(owner: str, name: object, known: Sequence[str]) -> str:
    """Return the message for a name that is not among the `known` ones, with the nearest of them."""
    nearest = get_close_matches(str(name)[:100], known, n=1, cutoff=0.5)
    return f"{owner} has no field {shown(name)}." + (f" Did you mean {nearest[0]}?" if nearest else "")


class Metric(NamedTuple):
    """
    How tables and the Hub name a metric of outputs.

    Args:
        label: Its name in tables.
        hub_type: The library of the Hub that computes it, in the metadata of model cards.
    """

    label: str
    hub_type: str


# The metrics, by their names in recipes, commands and results. `modeling_llm2slm.evaluation.metrics` computes them.
METRICS = {
    "bleu": Metric("BLEU", "sacrebleu"),
    "chrf": Metric("chrF", "chrf"),
    "rouge1": Metric("ROUGE-1", "rouge"),
    "rouge2": Metric("ROUGE-2", "rouge"),
    "rougeL": Metric("ROUGE-L", "rouge"),
    "exact_match": Metric("exact_match", "exact_match"),
}

DATA, MODEL, GENERATION, COMPUTE, CLUSTER = "Data", "Model", "Generation", "Computation", "Ray cluster"
# Help of options that several commands have.
FUSION = (
    "How the LLM's states enter the SLM: add (to an embedding of the prompt), replace (it), cache (as keys and values "
    "of an SLM that was cut from the LLM), or a registered fusion."
)
SPLIT = "Split of a data set on the Hub; a file is one split."
TRUNCATE = "Truncate prompts to this many tokens."
DTYPE = "dtype of the weights. Default: float32; the LLM of an LLM-to-SLM model keeps its own."
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where to compute."""

    device: str = option("cpu", "Device: cpu, cuda, cuda:1, mps.", panel=COMPUTE, **DEVICE)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which rows of a data set to read."""

    prompt_column: str = option("prompt", "Column that holds the prompts.", panel=DATA)
    split: str = option("train", SPLIT, panel=DATA)
    limit: int | None = option(None, "Read only this many rows, from the top.", minimum=1, panel=DATA)
    skip_bad_rows: bool = option(
        False, "Skip rows that hold no text or are too long, with a warning that lists them.", panel=DATA
    )
    prompt_max_length: int | None = option(None, TRUNCATE, panel=DATA, **LENGTH)


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(Settings):
    """How long outputs may be and how they are searched for."""

    max_new_tokens: int | None = option(
        None, "Longest output, in tokens. Default: the model's own, or 128.", panel=GENERATION, **OUTPUT_LENGTH
    )
    num_beams: int = option(1, "Number of beams; 1 is greedy decoding.", panel=GENERATION, **BEAMS)

    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate()`. Greedy or beams unless sampling is asked for, whatever a checkpoint's default."""
        limit = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        return {**limit, "num_beams": self.num_beams, "do_sample": False}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(DecodingSettings):
    """How to generate, with sampling."""

    sample: bool = option(False, "Sample instead of greedy decoding.", panel=GENERATION)
    temperature: float | None = option(None, "Sampling temperature.", panel=GENERATION, **TEMPERATURE)
    top_p: float | None = option(
        None, "Sample from the most likely tokens with this total probability (0 to 1).", panel=GENERATION, **TOP_P
    )
    seed: int | None = option(None, "Random seed for sampling.", panel=GENERATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sample and not (self.temperature is None and self.top_p is None):
            raise ValueError("temperature and top_p need sampling: add --sample (sample=True), or leave them out.")

    def generate_kwargs(self) -> dict[str, Any]:
        kwargs = super().generate_kwargs()
        if self.sample:
            kwargs |= {
                "do_sample": True,
                "temperature": 1.0 if self.temperature is None else self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
            }
        return kwargs


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(Settings):
    """
    Arguments of transformers' `generate()`, as recipes and [`TextToText.generate`] take them.
    """

    max_new_tokens: int | None = option(None, "Longest output, in tokens.", **OUTPUT_LENGTH)
    max_length: int | None = option(None, "Longest output, in tokens, with the start token.", **OUTPUT_LENGTH)
    min_new_tokens: int | None = option(None, "Shortest output, in tokens.", **{**OUTPUT_LENGTH, "minimum": 0})
    min_length: int | None = option(
        None, "Shortest output, in tokens, with the start token.", **{**OUTPUT_LENGTH, "minimum": 0}
    )
    max_time: float | None = option(None, "Seconds after which generation stops.", above=0)
    num_beams: int | None = option(None, "Number of beams.", **BEAMS)
    early_stopping: bool | Literal["never"] | None = option(None, "When beam search stops.")
    length_penalty: float | None = option(None, "Exponent of the length in the score of a beam.")
    num_return_sequences: int | None = option(None, "Outputs per prompt.", minimum=1, maximum=1)
    do_sample: bool | None = option(None, "Sample instead of taking the most likely token.")
    temperature: float | None = option(None, "Sampling temperature.", sampling=True, **TEMPERATURE)
    top_k: int | None = option(None, "Sample from this many tokens; 0 is all.", sampling=True, minimum=0)
    top_p: float | None = option(None, "Sample from tokens with this total probability.", sampling=True, **TOP_P)
    min_p: float | None = option(
        None, "Sample from tokens with this part of the top probability.", sampling=True, minimum=0, maximum=1
    )
    typical_p: float | None = option(None, "Sample typical tokens with this mass.", sampling=True, above=0, maximum=1)
    epsilon_cutoff: float | None = option(None, "Least probability sampled.", sampling=True, minimum=0, below=1)
    eta_cutoff: float | None = option(None, "Least probability by entropy.", sampling=True, minimum=0, below=1)
    repetition_penalty: float | None = option(None, "Divides the logits of tokens that occurred.", **PENALTY)
    encoder_repetition_penalty: float | None = option(None, "The same for tokens of the prompt.", **PENALTY)
    no_repeat_ngram_size: int | None = option(None, "Length of token sequences that may not repeat.", minimum=0)
    encoder_no_repeat_ngram_size: int | None = option(None, "The same for sequences of the prompt.", minimum=0)
    bad_words_ids: list[list[int]] | None = option(None, "Token sequences that are not generated.", minimum=0)
    suppress_tokens: list[int] | None = option(None, "Tokens that are not generated.", minimum=0)
    begin_suppress_tokens: list[int] | None = option(None, "Tokens that do not come first.", minimum=0)
    forced_bos_token_id: int | None = option(None, "The first token.", minimum=0)
    forced_eos_token_id: int | list[int] | None = option(None, "The last token at the longest length.", minimum=0)
    bos_token_id: int | None = option(None, "The start token.", minimum=0)
    eos_token_id: int | list[int] | None = option(None, "The end token, or several.", minimum=0)
    pad_token_id: int | None = option(None, "The padding token.", minimum=0)
    decoder_start_token_id: int | None = option(None, "The token before the first.", minimum=0)
    renormalize_logits: bool | None = option(None, "Normalize the logits after they were changed.")
    remove_invalid_values: bool | None = option(None, "Replace NaN and infinity in the logits.")
    use_cache: bool | None = option(None, "Keep keys and values of earlier tokens.")


def check_generate_arguments(arguments: Mapping[str, Any], owner: str = "") -> None:
    """
    Raise `ValueError` if an argument of `generate()` has a value that no model can use.

    Args:
        arguments: Arguments of `generate()`. Those that are not in [`GenerateArguments`] are not checked.
        owner: Where they come from, for the message: `"generation."`.
    """
    for argument, kind in types_of(GenerateArguments).items():
        value = arguments.get(argument.name)
        if not hasattr(value, "dtype"):  # `generate()` also takes token ids as tensors
            check_value(f"{owner}{argument.name}", value, argument.metadata, kind)


@dataclass(frozen=True, kw_only=True)
class LoadSettings(DeviceSettings):
    """How a model is loaded to generate."""

    engine: str | None = option(
        None, "Engine that generates, such as vllm. Default: the one that the model was exported for, or pytorch.",
        panel=COMPUTE,
    )  # fmt: skip
    quantize: str | None = option(
        None, "Quantize the weights: int8 (torchao) or nf4 (bitsandbytes). On a CPU, export the model instead.",
        choices=("int8", "nf4"), panel=COMPUTE,
    )  # fmt: skip
    dtype: str | None = option(None, DTYPE, panel=COMPUTE, choices=DTYPES)
    allow_nonfinite: bool = option(False, "Also load a model with weights that are not finite.", panel=MODEL)


@dataclass(frozen=True, kw_only=True)
class BuildSettings(Settings):
    """How an LLM and an SLM become a new LLM-to-SLM checkpoint."""

    llm_tokenizer: str | None = option(None, "Tokenizer of the LLM. Default: its own.", panel=MODEL)
    slm_tokenizer: str | None = option(
        None, "Tokenizer of the SLM. Default: its own; for a config file, the LLM's.", panel=MODEL
    )
    fusion: str | None = option(None, f"{FUSION} Default: add, or the preset's.", panel=MODEL)
    encoder_layer: int | list[int] | None = option(
        None, "Use the LLM's hidden states of this layer; repeat it to use those of several.", minimum=0, panel=MODEL
    )
    slm_first_token: bool = option(
        False, "With fusion cache: the SLM predicts the first output token too, and not the LLM.", panel=MODEL
    )
    encoder_dtype: str | None = option(None, "dtype of the LLM, such as bfloat16. Default: its own.", panel=MODEL)
    decoder_dtype: str | None = option(None, "dtype of the SLM. Default: its own.", panel=MODEL)
    encoder_revision: str | None = option(None, "Revision of the LLM on the Hub.", panel=MODEL)
    decoder_revision: str | None = option(None, "Revision of the SLM on the Hub.", panel=MODEL)
    prompt_max_length: int | None = option(None, TRUNCATE, panel=MODEL, **LENGTH)
    target_max_length: int | None = option(None, "Truncate targets to this many tokens.", panel=MODEL, **TARGET_LENGTH)
    max_new_tokens: int | None = option(None, "Longest output, in tokens.", panel=MODEL, **OUTPUT_LENGTH)
    seed: int = option(0, "Random seed for new weights.", panel=MODEL, **SEED)
    max_shard_size: str = option("1GB", "Maximum size of a weight file.", panel=MODEL, **FILE_SIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.encoder_layer, list) and len(self.encoder_layer) == 1:  # an option that may be repeated
            object.__setattr__(self, "encoder_layer", self.encoder_layer[0])


@dataclass(frozen=True, kw_only=True)
class CardSettings(Settings):
    """What a model card says besides results."""

    language: list[str] | None = option(None, "A language code, such as de; repeatable.")
    license: str | None = option(None, "The licence. Default: that of LLM and SLM, if they share one.")
    dataset: list[str] | None = option(None, "A data set that it was trained on; repeatable.")
    task: str = option("text-generation", "The Hub's name of the task, such as translation.")
    name: str | None = option(None, "The repository that the example code names. Default: the folder.")
    leaderboard: str | None = option(
        None, "Also write this metric's scores on data sets of the Hub to .eval_results.", choices=tuple(METRICS)
    )


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(DataSettings):
    """Which texts, prompts and targets, a conversion reads."""

    target_column: list[str] | None = option(
        None, "Column that holds targets; may be repeated. Default: target.", panel=DATA
    )


@dataclass(frozen=True, kw_only=True)
class PruneSettings(CorpusSettings):
    """Which texts decide the tokens of a pruned vocabulary."""

    prompt_max_length: int | None = option(None, TRUNCATE, cli=False)  # whole prompts count
    min_count: int = option(1, "Keep only tokens that the corpus uses this many times.", minimum=1, panel=DATA)


@dataclass(frozen=True, kw_only=True)
class RaySettings(Settings):
    """Which workers of a Ray cluster compute."""

    ray: str | None = option(
        None, "Compute on a Ray cluster: its address, or local for this machine. Without a value: RAY_ADDRESS, a "
        "cluster that runs here, or this machine.", panel=CLUSTER,
    )  # fmt: skip
    ray_workers: int | None = option(
        None, "Workers, each with a copy of the model. Default: one for each GPU with --device cuda, else one for "
        "each node.", minimum=1, panel=CLUSTER,
    )  # fmt: skip
    ray_cpus: float = option(1, "CPUs, and CPU threads, of a worker.", above=0, panel=CLUSTER)
    ray_gpus: float | None = option(
        None, "GPUs of a worker. Default: 1 with --device cuda, else 0.", minimum=0, panel=CLUSTER
    )


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DeviceSettings, DataSettings):
    """How prompts become stored hidden states."""

    dtype: str = option("bfloat16", "dtype of the stored hidden states.", choices=DTYPES, panel=COMPUTE)
    batch_size: int = option(32, "Prompts per batch.", minimum=1, panel=COMPUTE)
    shard_bytes: int = option(128 * 2**20, "Maximum size of a file of the store, in bytes.", minimum=1, cli=False)
    overwrite: bool = option(False, "Replace an existing store.")


@dataclass(frozen=True, kw_only=True)
class GenerateFileSettings(SamplingSettings, DataSettings, LoadSettings):
    """How a file of prompts becomes a file of outputs."""

    split: str = option("train", SPLIT, cli=False)  # the command reads files only
    column: str = option("model_output", "Column for the outputs, in a .jsonl.", panel=DATA)
    batch_size: int = option(128, "Prompts per batch.", minimum=1, panel=COMPUTE)
    batch_tokens: int | None = option(
        4096, "Prompt tokens per batch, padding included; a longer prompt is a batch of its own.", minimum=1,
        panel=COMPUTE,
    )  # fmt: skip
    overlap: bool | None = option(None, "Encode the next batch while one is generated.", cli=False)
    overwrite: bool = option(False, "Replace an existing output, or the parts that an interrupted run left.")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(DecodingSettings, DeviceSettings, DataSettings):
    """How the LLM writes targets to train on."""

    column: str = option("llm_output", "Column for the LLM's outputs.", panel=DATA)
    num_beams: int = option(4, "Number of beams; 1 is greedy decoding.", panel=GENERATION, **BEAMS)
    batch_size: int = option(32, "Prompts per batch.", minimum=1, panel=COMPUTE)
    dtype: str | None = option(None, DTYPE, panel=COMPUTE, choices=DTYPES)
    overwrite: bool = option(False, "Replace an existing output, or the parts that an interrupted run left.")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(DecodingSettings, DataSettings):
    """How a model is scored."""

    split: str = option("test", SPLIT, panel=DATA)
    target_column: str = option("target", "Column that holds the references.", panel=DATA)
    batch_size: int = option(32, "Prompts per batch; outputs are timed one at a time.", minimum=1, panel=COMPUTE)
    timed_outputs: int = option(50, "Time this many outputs, one at a time.", minimum=0, panel=COMPUTE)
    worst: int = option(5, "With --against: show this many of the outputs that differ most.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(DeviceSettings):
    """What `plan` measures and what the planned training would be."""

    prompt_column: str = option("prompt", "Column that holds the prompts.", panel=DATA)
    prompt_max_length: int | None = option(None, TRUNCATE, panel=DATA, **LENGTH)
    skip_bad_rows: bool = option(False, "Skip rows that hold no text, with a warning that lists them.", panel=DATA)
    timed_prompts: int = option(4, "Generate for this many prompts.", minimum=1)
    epochs: float = option(5, "Number of epochs assumed by the estimate.", panel="Planned training", **EPOCHS)
    batch_size: int = option(32, "Batch size assumed by the estimate.", minimum=1, panel="Planned training")
    num_beams: int = option(4, "Number of beams in the distillation assumed by the estimate.", cli=False, **BEAMS)
    max_new_tokens: int = option(128, "Longest output, in tokens.", panel=GENERATION, **OUTPUT_LENGTH)
    memory: float | None = option(
        None, "Memory limit of the measurement, in GB. Default: three quarters of the free memory.", above=0,
        panel=COMPUTE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpeedupSettings(Settings):
    """
    Settings of a speed-up, saved without secrets in `speedup.json`. A repeated run may change those of stages that
    have not finished yet; others are refused.
    """

    llm: str = option(MISSING, "The LLM with its decoder: a folder, or a name on the Hub.", panel=MODEL)
    prompts: str = option(MISSING, "Prompts: .txt, .jsonl, .csv, .parquet, or a data set on the Hub.", panel=DATA)
    slm: str = option(
        "openai-community/gpt2",
        "The SLM: a folder, a name on the Hub, or a config .json; or cut:4, four layers of a decoder-only LLM, which "
        "its outputs choose.",
        panel=MODEL,
    )
    slm_tokenizer: str | None = option(
        None, "Tokenizer of the SLM. Default: its own; for a config file, the LLM's.", panel=MODEL
    )
    fusion: str | None = option(None, f"{FUSION} Default: cache for an SLM that is cut, else add.", panel=MODEL)
    encoder_dtype: str | None = option(None, "dtype of the LLM, such as bfloat16.", panel=MODEL)
    prompt_column: str = option("prompt", "Column that holds the prompts.", panel=DATA)
    limit: int | None = option(None, "Read only this many rows, from the top.", minimum=3, panel=DATA)
    held_out: int = option(
        500, "Prompts to hold out for validation, and as many for the test; at most a tenth each.", minimum=1,
        panel=DATA,
    )  # fmt: skip
    num_beams: int = option(4, "Number of beams for the LLM's outputs.", panel=GENERATION, **BEAMS)
    max_new_tokens: int = option(128, "Longest output, in tokens.", panel=GENERATION, **OUTPUT_LENGTH)
    batch_size: int = option(32, "Prompts per batch for the LLM.", minimum=1, panel=COMPUTE)
    recipe: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "Recipe fields.", "cli": False})


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """What the HTTP server does and what it refuses."""

    name: str = option("", "Name of the model in requests. Default: that of its folder.")
    max_batch: int = option(16, "Prompts per batch.", minimum=1, panel="Batching")
    max_wait: float = option(5, "Milliseconds a batch waits for more prompts.", panel="Batching", minimum=0, **WAIT)
    allow_origin: list[str] | None = option(
        None, "Origin of web pages that may send requests (CORS); repeat it for several. * allows all.", **ORIGIN
    )
    max_queue: int = option(64, "Outputs that may wait; more are refused with 503.", minimum=1, panel="Limits")
    max_prompt_tokens: int | None = option(
        None, "Longest prompt, in tokens. Default: the checkpoint's limit, or 2048.", panel="Limits", **LENGTH
    )
    max_new_tokens: int | None = option(
        None, "Longest output a request may ask for, in tokens. Default: 1024, or the checkpoint's limit if larger.",
        panel="Limits", **OUTPUT_LENGTH,
    )  # fmt: skip
    max_body: int = option(1_000_000, "Largest request, in bytes.", minimum=1, cli=False)
    num_beams: int = option(1, "Number of beams; above 1, no streaming and no sampling.", panel=GENERATION, **BEAMS)
    timeout: float = option(
        120, "Seconds after which a request fails; those that would not be finished by then are refused with 503.",
        panel="Limits", minimum=0.1, **WAIT,
    )  # fmt: skip
    shutdown_timeout: float | None = option(
        None, "Seconds that accepted requests get at shutdown. Default: --timeout.", panel="Limits", minimum=1, **WAIT
    )


@dataclass(frozen=True, kw_only=True)
class PlaygroundSettings(Settings):
    """The page of the HTTP server."""

    playground: bool = option(
        False, "Also serve a page that shows LLM and LLM-to-SLM side by side, at /playground/.", panel="Playground"
    )
    llm: str | None = option(
        None, "The LLM to compare with: a folder, or a name on the Hub. Default: the one that the checkpoint names.",
        panel="Playground",
    )  # fmt: skip
    examples: str | None = option(
        None, "Example prompts: a .txt, or a .jsonl with the column prompt; the first six are shown.",
        panel="Playground",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(DeviceSettings):
    """Where and on what a benchmark runs."""

    threads: int = option(1, "CPU threads of each contestant.", panel=COMPUTE, **PROCESSES)
