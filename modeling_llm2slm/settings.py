"""
Settings of everything that a command does, each declared once: its name, type, default, bounds and help text.

Library functions take these classes; the command line and the reference pages are generated from them. The command
line loads this file without the package, which imports transformers: it may import the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple


def option(default: Any, help: str, **metadata: Any) -> Any:
    """
    Declare a setting.

    Args:
        default: Its default; `None` where it is decided at run time, `MISSING` for a required setting.
        help: One line: the help text on the command line and in the reference.
        metadata: `minimum` and `maximum` (inclusive bounds of a number), `above` (exclusive lower bound), `choices`,
            `panel` (the group of options in the help) and `cli=False` (not on the command line).
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks bounds and choices when it is created, and raises `ValueError` with the field."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            check_value(setting.name, getattr(self, setting.name), setting.metadata)


def check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a value is outside the bounds or choices that [`option`] declared."""
    if value is None:
        return
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}, but it must be one of: {', '.join(map(str, choices))}.")
    bounds = {
        "minimum": ("at least", lambda bound: value >= bound),
        "maximum": ("at most", lambda bound: value <= bound),
        "above": ("above", lambda bound: value > bound),
    }
    for bound, (words, holds) in bounds.items():
        if bound in metadata and not holds(metadata[bound]):  # NaN fails every comparison
            raise ValueError(f"{name} is {value!r}, but it must be {words} {metadata[bound]}.")


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

DATA, MODEL, GENERATION, COMPUTE = "Data", "Model", "Generation", "Computation"
# Help of options that several commands have.
FUSION = (
    "How the LLM's states enter the SLM: add (to an embedding of the prompt), replace (it), cache (as keys and values "
    "of an SLM that was cut from the LLM), or a registered fusion."
)
SPLIT = "Split of a data set on the Hub; a file is one split."
TRUNCATE = "Truncate prompts to this many tokens."


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where to compute."""

    device: str = option("cpu", "Device: cpu, cuda, cuda:1, mps.", panel=COMPUTE)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which rows of a data set to read."""

    prompt_column: str = option("prompt", "Column that holds the prompts.", panel=DATA)
    split: str = option("train", SPLIT, panel=DATA)
    limit: int | None = option(None, "Read only this many rows, from the top.", minimum=1, panel=DATA)
    skip_bad_rows: bool = option(
        False, "Skip rows that hold no text or are too long, with a warning that lists them.", panel=DATA
    )
    prompt_max_length: int | None = option(None, TRUNCATE, minimum=1, panel=DATA)


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(Settings):
    """How long outputs may be and how they are searched for."""

    max_new_tokens: int | None = option(
        None, "Longest output, in tokens. Default: the model's own, or 128.", minimum=1, panel=GENERATION
    )
    num_beams: int = option(1, "Number of beams; 1 is greedy decoding.", minimum=1, panel=GENERATION)

    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate()`. Greedy or beams unless sampling is asked for, whatever a checkpoint's default."""
        limit = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        return {**limit, "num_beams": self.num_beams, "do_sample": False}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(DecodingSettings):
    """How to generate, with sampling."""

    sample: bool = option(False, "Sample instead of greedy decoding.", panel=GENERATION)
    temperature: float | None = option(None, "Sampling temperature (> 0).", above=0, panel=GENERATION)
    top_p: float | None = option(
        None, "Sample from the most likely tokens with this total probability (0 to 1).", above=0, maximum=1,
        panel=GENERATION,
    )  # fmt: skip
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
class LoadSettings(DeviceSettings):
    """How a model is loaded to generate."""

    quantize: str | None = option(
        None, "Quantize the weights: int8 (torchao) or nf4 (bitsandbytes). On a CPU, export the model instead.",
        choices=("int8", "nf4"), panel=COMPUTE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BuildSettings(Settings):
    """How an LLM and an SLM become a new LLM-to-SLM checkpoint."""

    llm_tokenizer: str | None = option(None, "Tokenizer of the LLM. Default: its own.", panel=MODEL)
    slm_tokenizer: str | None = option(
        None, "Tokenizer of the SLM. Default: its own; for a config file, the LLM's.", panel=MODEL
    )
    fusion: str | None = option(None, f"{FUSION} Default: add, or the preset's.", panel=MODEL)
    encoder_layer: int | None = option(None, "Use the LLM's hidden states of this layer.", minimum=0, panel=MODEL)
    slm_first_token: bool = option(
        False, "With fusion cache: the SLM predicts the first output token too, and not the LLM.", panel=MODEL
    )
    encoder_dtype: str | None = option(None, "dtype of the LLM, such as bfloat16. Default: its own.", panel=MODEL)
    decoder_dtype: str | None = option(None, "dtype of the SLM. Default: its own.", panel=MODEL)
    encoder_revision: str | None = option(None, "Revision of the LLM on the Hub.", panel=MODEL)
    decoder_revision: str | None = option(None, "Revision of the SLM on the Hub.", panel=MODEL)
    prompt_max_length: int | None = option(None, TRUNCATE, minimum=1, panel=MODEL)
    target_max_length: int | None = option(None, "Truncate targets to this many tokens.", minimum=2, panel=MODEL)
    max_new_tokens: int | None = option(None, "Longest output, in tokens.", minimum=1, panel=MODEL)
    seed: int = option(0, "Random seed for new weights.", panel=MODEL)
    max_shard_size: str = option("1GB", "Maximum size of a weight file.", panel=MODEL)


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DeviceSettings, DataSettings):
    """How prompts become stored hidden states."""

    dtype: str = option(
        "bfloat16", "dtype of the stored hidden states.", choices=("bfloat16", "float16", "float32"), panel=COMPUTE
    )
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
    num_beams: int = option(4, "Number of beams; 1 is greedy decoding.", minimum=1, panel=GENERATION)
    batch_size: int = option(32, "Prompts per batch.", minimum=1, panel=COMPUTE)
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
    prompt_max_length: int | None = option(None, TRUNCATE, minimum=1, panel=DATA)
    skip_bad_rows: bool = option(False, "Skip rows that hold no text, with a warning that lists them.", panel=DATA)
    timed_prompts: int = option(4, "Generate for this many prompts.", minimum=1)
    epochs: float = option(5, "Number of epochs assumed by the estimate.", above=0, panel="Planned training")
    batch_size: int = option(32, "Batch size assumed by the estimate.", minimum=1, panel="Planned training")
    num_beams: int = option(4, "Number of beams in the distillation assumed by the estimate.", minimum=1, cli=False)
    max_new_tokens: int = option(128, "Longest output, in tokens.", minimum=1, panel=GENERATION)


@dataclass(frozen=True, kw_only=True)
class SpeedupSettings(Settings):
    """
    Settings of a speed-up, saved without secrets in `speedup.json`. A repeated run may change those of stages that
    have not finished yet; others are refused.
    """

    llm: str = option(MISSING, "The LLM with its decoder: a folder, or a name on the Hub.", panel=MODEL)
    prompts: str = option(MISSING, "Prompts: .txt, .jsonl, .csv, .parquet, or a data set on the Hub.", panel=DATA)
    slm: str = option("openai-community/gpt2", "The SLM: a folder, a name on the Hub, or a config .json.", panel=MODEL)
    slm_tokenizer: str | None = option(
        None, "Tokenizer of the SLM. Default: its own; for a config file, the LLM's.", panel=MODEL
    )
    fusion: str = option("add", FUSION, panel=MODEL)
    encoder_dtype: str | None = option(None, "dtype of the LLM, such as bfloat16.", panel=MODEL)
    prompt_column: str = option("prompt", "Column that holds the prompts.", panel=DATA)
    limit: int | None = option(None, "Read only this many rows, from the top.", minimum=3, panel=DATA)
    held_out: int = option(
        500, "Prompts to hold out for validation, and as many for the test; at most a tenth each.", minimum=1,
        panel=DATA,
    )  # fmt: skip
    num_beams: int = option(4, "Number of beams for the LLM's outputs.", minimum=1, panel=GENERATION)
    max_new_tokens: int = option(128, "Longest output, in tokens.", minimum=1, panel=GENERATION)
    batch_size: int = option(32, "Prompts per batch for the LLM.", minimum=1, panel=COMPUTE)
    recipe: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "Recipe fields.", "cli": False})


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """What the HTTP server does and what it refuses."""

    name: str = option("", "Name of the model in requests. Default: that of its folder.")
    max_batch: int = option(16, "Prompts per batch.", minimum=1, panel="Batching")
    max_wait: float = option(5, "Milliseconds a batch waits for more prompts.", minimum=0, panel="Batching")
    max_queue: int = option(64, "Prompts that may wait; more are refused with 503.", minimum=1, panel="Limits")
    max_prompt_tokens: int | None = option(
        None, "Longest prompt, in tokens. Default: the checkpoint's limit, or 2048.", minimum=1, panel="Limits"
    )
    max_new_tokens: int | None = option(
        None, "Longest output a request may ask for, in tokens. Default: 1024, or the checkpoint's limit if larger.",
        minimum=1, panel="Limits",
    )  # fmt: skip
    max_body: int = option(1_000_000, "Largest request, in bytes.", minimum=1, cli=False)
    num_beams: int = option(1, "Number of beams; above 1, no streaming and no sampling.", minimum=1, panel=GENERATION)
    timeout: float = option(120, "Seconds after which a request fails.", minimum=0.1, panel="Limits")
    shutdown_timeout: float = option(30, "Seconds that running requests get at shutdown.", minimum=1, panel="Limits")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(DeviceSettings):
    """Where and on what a benchmark runs."""

    threads: int = option(1, "CPU threads of each contestant.", minimum=1, panel=COMPUTE)
