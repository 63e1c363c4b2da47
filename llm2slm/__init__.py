"""
The `llm2slm` command.

It is imported for every `--help`, so it imports nothing heavy: torch, transformers and the package come inside the
commands.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


if TYPE_CHECKING:
    from modeling_llm2slm.conversion import Report
    from modeling_llm2slm.inference.text_to_text import TextToText

app = typer.Typer(
    name="llm2slm",
    help="A large frozen language model reads the prompt once, a small one writes the answer.",
    epilog="Set LLM2SLM_DEBUG=1 to see the traceback behind an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
convert = typer.Typer(
    help="Turn one form of a checkpoint into another. Each result is loaded and compared before it is put in place.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    # An option that is called `force` in the functions may be called so here as well.
    context_settings={"token_normalize_func": lambda name: "overwrite" if name == "force" else name},
)
app.add_typer(convert, name="convert")
out = Console()
err = Console(stderr=True)

# What to do about what the system says of a file; of all else, to take another.
REMEDIES = {
    errno.EACCES: "Change its permissions, or choose another place.",
    errno.EPERM: "Change its permissions, or choose another place.",
    errno.ENOSPC: "Free some space, or choose another disk.",
    errno.EDQUOT: "Free some space, or choose another disk.",
    errno.ENOENT: "Check the path.",
    errno.EEXIST: "It is a file, where a folder is needed: choose another place.",
}

ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint: a folder, or a name on the Hub.", show_default=False)
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="The longest answer, in tokens; default: the model's, or 128.")
]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams to search with; 1 is greedy.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Matrices in fewer bits: int8 (torchao), nf4 (bitsandbytes). On a CPU, an exported model is faster."
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
PromptColumn = Annotated[str, typer.Option(help="The column that holds what the model reads.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that are no text, with a warning.")]
AnswerColumn = Annotated[str, typer.Option(help="The column that holds the answers.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; whatever is wrong with its input becomes one sentence and a non-zero exit status."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="llm2slm")
    except (OSError, ValueError, ImportError) as error:
        if os.environ.get("LLM2SLM_DEBUG"):
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    if isinstance(error, ModuleNotFoundError):
        extra = "benchmark" if error.name in ("ctranslate2", "matplotlib") else "train"
        message = f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[{extra}]'"
    elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        fix = REMEDIES.get(error.errno, "Choose another place.")
        message = f"{error.filename}: {(error.strerror or type(error).__name__).lower()}. {fix}"
    else:
        message = " ".join(str(error).split()) or type(error).__name__
    err.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    raise SystemExit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(version("modeling-llm2slm"), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    output: Annotated[Path, typer.Argument(help="The folder to write the checkpoint to.", show_default=False)],
    llm: Annotated[str | None, typer.Option(help="The model that reads: folder, Hub name, or config .json.")] = None,
    slm: Annotated[str | None, typer.Option(help="The model that writes: folder, Hub name, or config .json.")] = None,
    preset: Annotated[str | None, typer.Option(help="A preset in place of both, such as t5-large_gpt2.")] = None,
    llm_tokenizer: Annotated[str | None, typer.Option(help="Default: the one that comes with the LLM.")] = None,
    slm_tokenizer: Annotated[str | None, typer.Option(help="Default: its own; of a config, the LLM's.")] = None,
    fusion: Annotated[
        str | None, typer.Option(help="What the SLM reads: add or replace. Default: add, or the preset's.")
    ] = None,
    encoder_layer: Annotated[int | None, typer.Option(help="Take the LLM's states from this layer.")] = None,
    encoder_dtype: Annotated[str | None, typer.Option(help="The LLM's dtype, such as bfloat16.")] = None,
    decoder_dtype: Annotated[str | None, typer.Option(help="The SLM's dtype.")] = None,
    prompt_max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")] = None,
    target_max_length: Annotated[int | None, typer.Option(help="Cut answers to this many tokens.")] = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option(help="For weights that are random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """
    Put an LLM and an SLM together, or make one of them to train alone.

    `llm2slm build runs/start --llm google-t5/t5-large --slm openai-community/gpt2`

    A config file in place of a model gives random weights of that shape. With `--llm` alone the result is a plain
    encoder-decoder, with `--slm` alone a plain decoder-only model.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise FileExistsError(f"{output} is not empty. Choose another folder, or add --overwrite.")
    _quiet()
    from modeling_llm2slm.conversion.build import build as build_checkpoint
    from modeling_llm2slm.data.files import atomic_write

    composite = {
        "fusion": fusion,
        "encoder_layer": encoder_layer,
        "encoder_dtype": encoder_dtype,
        "decoder_dtype": decoder_dtype,
    }
    composite = {name: value for name, value in composite.items() if value is not None}
    text_to_text = build_checkpoint(
        llm, slm, llm_tokenizer, slm_tokenizer, preset=preset, prompt_max_length=prompt_max_length,
        target_max_length=target_max_length, max_new_tokens=max_new_tokens, seed=seed, **composite,
    )  # fmt: skip
    with atomic_write(output, keep=not overwrite) as folder:
        text_to_text.save_pretrained(folder, **({"card": {"name": output.name}} if llm and slm or preset else {}))
    _print_model(str(output), text_to_text)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
) -> None:
    """
    Train a checkpoint as a recipe says.

    `llm2slm train recipe.yaml --num_train_epochs 5 --output_dir runs/five`

    A recipe holds `model`, `train_data`, `output_dir`, and any of `validation_data`, `train_split`, `validation_split`
    (of data sets on the Hub), `prompt_column`, `target_column`, `prompt_max_length`, `target_max_length`,
    `train_samples`, `validation_samples`, `optimizer`, `metric`, `generation`, `resume`, `llm_states`,
    `learning_rate_mapping`, `lora`, `quantize_llm`, `skip_bad_rows`, `streaming`, `shuffle_buffer`,
    `preprocessing_num_workers`, and every field of transformers' Seq2SeqTrainingArguments. Each is an option of this
    command as well, which goes before the recipe's own value. A run that was stopped continues where it was. On
    several devices:
    `accelerate launch --config_file FILE -m llm2slm train recipe.yaml`.
    """
    overrides = dict(_overrides(context.args))
    _quiet(progress=True)
    _quiet_data()
    from modeling_llm2slm.training.training import load_recipe
    from modeling_llm2slm.training.training import train as train_model

    settings = load_recipe(recipe, overrides)
    report = train_model(settings)
    out.print(f"Trained {report['steps']} steps in {report['seconds']:.0f} s.", highlight=False)
    if report["best_metric"] is not None:
        out.print(f"Best validation {report['metric']}: {report['best_metric']:.4g} at step {report['best_step']}.")
    out.print(f"The model is in {os.path.expandvars(str(settings['output_dir']))}.", soft_wrap=True, highlight=False)


@app.command()
def encode(
    model: ModelArgument,
    data: Annotated[list[str], typer.Argument(help="All that is trained and validated on.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The folder of the store.", show_default=False)],
    prompt_column: PromptColumn = "prompt",
    split: Annotated[str, typer.Option(help="Of a data set on the Hub.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Encode this many prompts of each, from the top.")] = None,
    prompt_max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="What states are stored in: bfloat16, float16, float32.")] = "bfloat16",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 32,
    device: Device = "cpu",
    skip_bad_rows: SkipBadRows = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what is in the folder.")] = False,
) -> None:
    """
    Run the LLM over all prompts once, and store its states for training.

    `llm2slm encode runs/start train.jsonl val.jsonl --output runs/states`

    `llm2slm train recipe.yaml --llm_states runs/states` then loads no LLM. A run that was stopped continues where it
    was; `torchrun --nproc_per_node 8 -m llm2slm encode ...` shares the work among eight devices.
    """
    _quiet()
    _quiet_data()
    from modeling_llm2slm.states.encoding import encode as encode_prompts

    with _progress("prompts") as counter:

        def announce(description: Any, to_write: int) -> None:
            err.print(
                f"{description.prompts:,} different prompts of {description.tokens:,} tokens, "
                f"{description.hidden_size} numbers each in {description.dtype}: {_size(description.nbytes)}"
                + (f", {_size(to_write)} of it still to be written." if to_write != description.nbytes else "."),
                highlight=False,
                soft_wrap=True,
            )

        encode_prompts(
            model, data, output, prompt_column, split=split, limit=limit, prompt_max_length=prompt_max_length,
            dtype=dtype, batch_size=batch_size, device=_local(device), skip_bad_rows=skip_bad_rows,
            overwrite=overwrite, announce=announce, progress=partial(counter.count, "Encoding"),
        )  # fmt: skip
    out.print(f"The states are in {output}. Train with: --llm_states {output}", soft_wrap=True, highlight=False)


@app.command()
def distill(
    llm: Annotated[str, typer.Argument(help="The LLM with its decoder: a folder, or a name on the Hub.")],
    data: Annotated[str, typer.Argument(help="Prompts: .jsonl, .json, .csv, .parquet, .txt, or a data set's name.")],
    output: Annotated[Path, typer.Option(help="The .jsonl or .jsonl.gz to write.", show_default=False)],
    prompt_column: PromptColumn = "prompt",
    column: Annotated[str, typer.Option(help="The column for the LLM's answers.")] = "llm_output",
    split: Annotated[str, typer.Option(help="Of a data set on the Hub.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Answer this many prompts, from the top.")] = None,
    prompt_max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams to search with; 1 is greedy.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 32,
    device: Device = "cpu",
    skip_bad_rows: SkipBadRows = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """
    Have the LLM write the answers to train on, beside those that are there.

    `llm2slm distill google-t5/t5-large train.jsonl --output distilled.jsonl --max-new-tokens 64`

    A recipe with `target_column: llm_output` trains on them, one with `target_column: [target, llm_output]` on both. A
    run that was stopped continues where it was.
    """
    _quiet()
    _quiet_data()
    from modeling_llm2slm.training.distillation import distill as write_answers

    with _progress("prompts") as counter:
        rows = write_answers(
            llm, data, output, prompt_column, column=column, split=split, limit=limit,
            prompt_max_length=prompt_max_length, batch_size=batch_size, device=_local(device),
            skip_bad_rows=skip_bad_rows, overwrite=overwrite, progress=partial(counter.count, "Answering"),
            **_decoding(max_new_tokens, num_beams),
        )  # fmt: skip
    out.print(f"{rows:,} rows are in {output}, the answers in column {column}.", soft_wrap=True, highlight=False)


@app.command()
def plan(
    llm: Annotated[str, typer.Option(help="The LLM with its decoder: a folder, or a name on the Hub.")],
    data: Annotated[str, typer.Option(help="Your prompts: a file, or a data set on the Hub.")],
    prompt_column: PromptColumn = "prompt",
    preset: Annotated[
        list[str] | None, typer.Option(help="Try this preset, or config .json; may be repeated.")
    ] = None,
    slm_tokenizer: Annotated[
        list[str] | None, typer.Option(help="PRESET=FOLDER, where the SLM's tokenizer cannot be downloaded.")
    ] = None,
    timed_prompts: Annotated[int, typer.Option(min=1, help="Answer this many prompts.")] = 4,
    epochs: Annotated[float, typer.Option(help="Of the training that is estimated.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the training that is estimated.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    prompt_max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")] = None,
    skip_bad_rows: SkipBadRows = False,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
) -> None:
    """
    Tell what LLM-to-SLM would bring and cost here, before any training.

    `llm2slm plan --llm google-t5/t5-large --data prompts.txt`

    The LLM answers some of your prompts; then small models with random weights write as many tokens behind it.
    """
    _quiet()
    _quiet_data()
    from modeling_llm2slm.workflows.plan import SLMS
    from modeling_llm2slm.workflows.plan import plan as make_plan

    _check_output(output)
    pairs = [entry.partition("=") for entry in slm_tokenizer or []]
    if any(not path for _, _, path in pairs):
        raise typer.BadParameter("--slm-tokenizer takes PRESET=FOLDER.")
    with err.status("planning") as status:
        result = make_plan(
            llm, data, prompt_column, presets=preset or tuple(SLMS),
            slm_tokenizers={name: path for name, _, path in pairs}, timed_prompts=timed_prompts, epochs=epochs,
            batch_size=batch_size, max_new_tokens=max_new_tokens, prompt_max_length=prompt_max_length,
            skip_bad_rows=skip_bad_rows, device=device, progress=status.update,
        )  # fmt: skip
    _report({"llm": llm, "data": Path(data).name, **result}, output, _print_plan)


def _print_plan(result: dict[str, Any]) -> None:
    candidates = result["candidates"]
    table = Table("", *(candidate["name"] for candidate in candidates))
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "speed-up per answer": lambda row: f"{row['speed_up']:.2f}",
        "ms per answer, LLM": lambda row: f"{row['llm_ms_per_output']:.0f}",
        "ms per answer, LLM-to-SLM": lambda row: f"{row['ms_per_output']:.0f}",
        "tokens per answer, LLM": lambda row: f"{result['output_tokens']:.1f}",
        "tokens per answer, SLM": lambda row: f"{row['output_tokens']:.1f}" + ("*" if row["tokens_assumed"] else ""),
        "parameters that decode": lambda row: f"{row['slm_parameters'] / 1e6:.0f}M",
        "memory to answer": lambda row: _size(row["inference_bytes"]),
        "memory to train": lambda row: _size(row["training_bytes"]),
        "hours to distill, once": lambda row: f"{row['distill_hours']:.2g}",
        "hours to encode, once": lambda row: f"{row['encode_hours']:.2g}",
        f"hours to train {result['epochs']:g} epochs": lambda row: f"{row['train_hours']:.2g}",
    }
    if any(row["too_long"] for row in candidates):
        rows["prompts without room"] = lambda row: f"{row['too_long']:,}"
    for name, value in rows.items():
        table.add_row(name, *map(value, candidates))
    out.print(table)
    if any(row["tokens_assumed"] for row in candidates):
        out.print("* as many as the LLM's: the SLM's tokenizer was not found (--slm-tokenizer).", highlight=False)
    out.print(
        f"{result['prompts']:,} prompts of {result['prompt_tokens']:.1f} tokens; their states take "
        f"{_size(result['store_bytes'])}. Measured on {result['device']}, {result['threads']} threads, batch 1.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    out.print(result["recommendation"], style="bold", highlight=False, soft_wrap=True)


@app.command()
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write to.", show_default=False)],
    runtime: Annotated[str, typer.Option(help="What is to compute it: openvino or onnx.")] = "openvino",
    weights: Annotated[str, typer.Option(help="What weights become: fp32, bf16, int8, int4.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """
    Write a composite for a runtime that answers faster than PyTorch on a CPU.

    `llm2slm export runs/model runs/fast --runtime openvino --weights int8`

    `llm2slm generate`, `evaluate` and `info` take the result as they take a checkpoint. It is loaded and compared with
    PyTorch before it is put in place.
    """
    _quiet()
    from modeling_llm2slm.conversion import export as convert_to

    with err.status("loading") as status:
        report = convert_to(
            model, output, runtime=runtime, weights=weights, overwrite=overwrite, progress=status.update
        )
    _print_report(report)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def speedup(
    context: typer.Context,
    llm: Annotated[str, typer.Option(help="The LLM with its decoder: a folder, or a name on the Hub.")],
    prompts: Annotated[str, typer.Option(help="Prompts: .txt, .jsonl, .csv, .parquet, or a data set on the Hub.")],
    output: Annotated[Path, typer.Option(help="The folder for everything.")] = Path("runs/speedup"),
    slm: Annotated[str, typer.Option(help="The model that is to write: folder, Hub name, or config .json.")] = (
        "openai-community/gpt2"
    ),
    slm_tokenizer: Annotated[str | None, typer.Option(help="Default: its own; of a config, the LLM's.")] = None,
    prompt_column: PromptColumn = "prompt",
    limit: Annotated[int | None, typer.Option(min=3, help="Use this many prompts, from the top.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Hold out as many for validation, and for the test.")] = 500,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of the LLM's answers.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that the LLM reads and answers at once.")] = 32,
    fusion: Annotated[str, typer.Option(help="What the SLM reads: add or replace.")] = "add",
    encoder_dtype: Annotated[str | None, typer.Option(help="The LLM's dtype, such as bfloat16.")] = None,
    device: Device = "cpu",
) -> None:
    """
    From an LLM and prompts to a model that can be served: distill, build, encode, train, evaluate.

    `llm2slm speedup --llm google-t5/t5-large --prompts prompts.txt --output runs/fast --num_train_epochs 3`

    Every field of a recipe but its paths is an option as well. A run that was stopped continues where it was; each
    stage tells the command that does the same.
    """
    _quiet()
    _quiet_data()
    from modeling_llm2slm.workflows.speedup import Speedup, SpeedupSettings

    settings = SpeedupSettings(
        llm, prompts, slm, slm_tokenizer, prompt_column, limit, held_out, num_beams, max_new_tokens, batch_size,
        fusion, encoder_dtype, dict(_overrides(context.args)),
    )  # fmt: skip

    def announce(stage: str, command: str) -> None:
        out.print(f"[bold]{stage}[/]  {escape(command)}", soft_wrap=True, highlight=False)

    with _progress("prompts") as counter:
        result = Speedup(settings, output, _local(device), counter.count).run(announce)
    _print_comparison({"data": "test.jsonl", **result})
    out.print(f"The model is in {output}/model.", soft_wrap=True, highlight=False)


class _Counter:
    """Progress bars on standard error, which appear with the first thing that is counted."""

    def __init__(self, unit: str):
        self._unit = unit
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def count(self, what: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = self._start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, unit=self._unit)
        self._bars.update(self._tasks[what], completed=done, total=total, visible=done < total)

    def _start(self) -> Any:
        from rich import progress

        texts = progress.TextColumn("{task.description}"), progress.TextColumn("{task.fields[unit]}")
        times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
        columns = (texts[0], progress.BarColumn(), progress.MofNCompleteColumn(), texts[1], *times)
        bars = progress.Progress(*columns, console=err, transient=True)
        bars.start()
        return bars

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()


@contextmanager
def _progress(unit: str) -> Iterator[_Counter]:
    counter = _Counter(unit)
    try:
        yield counter
    finally:
        counter.stop()


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"


def _local(device: str) -> str:
    """The device of this process, where `torchrun` has started several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"{device}:{rank}" if rank is not None and device == "cuda" else device


def _overrides(words: list[str]) -> Iterator[tuple[str, str]]:
    """The pairs in `--name value`, `--name=value` and, for a switch, `--name` alone."""
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise typer.BadParameter(f"{word!r} does not belong to an option; write --name value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            has_value = position + 1 < len(words) and not words[position + 1].startswith("--")
            value = words[position + 1] if has_value else "true"
            position += has_value
        yield name.replace("-", "_"), value
        position += 1


@app.command()
def benchmark(
    sweep: Annotated[Path | None, typer.Argument(help="A YAML file of cells. Default: the one installed.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON file; a run that was stopped goes on in it.")] = Path(
        "runs/benchmark/benchmark.json"
    ),
    work: Annotated[Path, typer.Option(help="The folder for models with random weights, kept.")] = Path(
        "runs/benchmark"
    ),
    llm: Annotated[
        str | None, typer.Option(help="Given checkpoints in place of presets: the LLM with its decoder.")
    ] = None,
    llm2slm: Annotated[str | None, typer.Option(help="And the composite that is built on it.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots to this folder.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contestant.")] = 1,
    device: Device = "cpu",
) -> None:
    """
    Time the LLM, the SLM and LLM-to-SLM by turns, on every runtime that is installed.

    `llm2slm benchmark --plots docs/plots`

    `llm2slm benchmark --llm google-t5/t5-large --llm2slm runs/model`
    """
    if (llm is None) != (llm2slm is None):
        raise typer.BadParameter("--llm and --llm2slm belong together.")
    _quiet()
    from importlib.resources import files

    from modeling_llm2slm.benchmark.benchmark import Benchmark, load_sweep
    from modeling_llm2slm.benchmark.contestants import Cell, Models

    default = Path(str(files("modeling_llm2slm.configuration"))) / "benchmark.yaml"
    models = Models(work / "given", llm, llm2slm) if llm is not None and llm2slm is not None else None
    cells = [Cell()] if models is not None and sweep is None else load_sweep(sweep or default)
    with err.status("") as status:
        result = Benchmark(cells, output, work, models, device, threads, status.update).run()
    _print_benchmark(result, [cell.key for cell in cells])
    out.print(f"Everything is in {output}.", soft_wrap=True, highlight=False)
    if plots is not None:
        from modeling_llm2slm.benchmark.plots import plot

        for file in plot(result, plots):
            out.print(f"Plotted {file}.", soft_wrap=True, highlight=False)


def _print_benchmark(result: dict[str, Any], keys: list[str]) -> None:
    for preset in dict.fromkeys(result["cells"][key]["preset"] or "given" for key in keys):
        table = Table("", "load, s", "memory", title=preset)
        for name, cost in result["contestants"][preset].items():
            table.add_row(name, f"{cost['load_seconds']:.1f}", _size(cost["peak_bytes"]))
        _print_numbers(table)
    for key in keys:
        cell = result["cells"][key]
        noise = f", disturbed: others kept {cell['others_busy']:.1f} processors busy" if cell["noisy"] else ""
        table = Table("", "s", "x LLM", "first, ms", "token, ms", "floor, ms", "tokens/s", title=f"{key}{noise}")
        llm = cell["results"].get("llm")
        for name, row in cell["results"].items():
            values = [
                f"{row['seconds']:.2f}",
                f"{llm['seconds'] / row['seconds']:.2f}" if llm else "",
                f"{row['first_token_ms']:.0f}",
                f"{row['ms_per_token']:.1f}",
                f"{row['floor_ms_per_token']:.1f}" if "floor_ms_per_token" in row else "",
                f"{row['tokens_per_second']:.1f}",
            ]
            table.add_row(name, *values)
        _print_numbers(table)
        stages = ", ".join(f"{name} {value:.0f} ms" for name, value in cell["stages_ms"].items())
        reading = f"weights are read at {cell['gigabytes_per_second']:.1f} GB/s"
        out.print(f"{stages}; {reading}." if stages else f"{reading}.".capitalize(), soft_wrap=True, highlight=False)


def _print_numbers(table: Table) -> None:
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    out.print(table)


@app.command()
def generate(
    model: ModelArgument,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; default: standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read prompts from this file: lines of text, or .jsonl, .csv, .parquet.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write answers to this file, one a line; to a .jsonl with all columns.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens in place of taking the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling, above 0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts at once; above 1 nothing streams. Default: 1, from file to file 128."),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="From file to file: prompt tokens at once, padding included. Default: 4096."),
    ] = None,
    prompt_column: PromptColumn = "prompt",
    column: Annotated[str, typer.Option(help="The column for the answers, in a .jsonl.")] = "model_output",
    skip_bad_rows: SkipBadRows = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where another run was stopped before this output.")
    ] = False,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """
    Answer prompts, one answer a line, shown as it is written.

    `llm2slm generate runs/model "A man sleeps." "Two dogs play."`

    `cat prompts.txt | llm2slm generate runs/model --num-beams 4 --batch-size 16 > answers.txt`

    `llm2slm generate runs/model --file prompts.jsonl --output answers.jsonl`

    From file to file, prompts of similar length go together, equal ones are answered once (with `--sample`, read
    once), and a run that was stopped continues where it was.
    """
    if prompts and file:
        raise typer.BadParameter("Give prompts or --file, not both.")
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    options = _decoding(max_new_tokens, num_beams)
    if temperature is not None and temperature <= 0:
        raise typer.BadParameter("--temperature must be above 0; answers are greedy without --sample.")
    if sample:
        options.update(do_sample=True, temperature=temperature or 1.0, top_p=1.0 if top_p is None else top_p)
    elif temperature is not None or top_p is not None:
        raise typer.BadParameter("--temperature and --top-p belong to --sample.")
    if file is not None and output is not None:
        _quiet()
        _quiet_data()
        limits = {"rows": batch_size or 128, "tokens": batch_tokens or 4096}
        _generate_file(
            model, file, output, prompt_column, column=column, limits=limits, seed=seed if sample else None,
            device=_local(device), skip_bad_rows=skip_bad_rows, overwrite=overwrite, quantize=quantize, **options,
        )  # fmt: skip
        return
    if batch_tokens is not None:
        raise typer.BadParameter("--batch-tokens belongs to --file with --output.")
    _check_output(output)
    text_to_text, size = _load_model(model, device, seed, quantize), batch_size or 1
    texts = _prompts(prompts, file, prompt_column, skip_bad_rows)
    if output is not None:
        from modeling_llm2slm.data.files import atomic_write

        answers = text_to_text.generate(list(texts), size, **options)
        with atomic_write(output) as temporary:
            temporary.write_text("".join(f"{_one_line(answer)}\n" for answer in answers), encoding="utf-8")
    elif size == 1 and num_beams == 1:
        for prompt in texts:
            _stream(text_to_text, prompt, options)
    else:
        _print_batches(text_to_text, texts, size, options)


def _generate_file(
    model: str, file: Path, output: Path, prompt_column: str, limits: dict[str, Any], **options: Any
) -> None:
    from modeling_llm2slm.inference.batching import BatchLimits
    from modeling_llm2slm.inference.files import generate_file

    with _progress("answers") as counter:
        report = generate_file(
            model, file, output, prompt_column, limits=BatchLimits(**limits),
            progress=partial(counter.count, "Answering"), **options,
        )  # fmt: skip
    out.print(
        f"{report.rows:,} answers are in {output}: {report.duplicates:,} prompts occurred before, {report.kept:,} "
        f"answers were there already, {report.tokens:,} tokens were written in {report.seconds:.1f} s "
        f"({report.tokens_per_second:,.0f} tokens/s).",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _decoding(max_new_tokens: int | None, num_beams: int) -> dict[str, Any]:
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return {**limit, "num_beams": num_beams, "do_sample": False}  # a checkpoint may say that its answers are sampled


def _prompts(prompts: list[str] | None, file: Path | None, prompt_column: str, skip_bad_rows: bool) -> Iterator[str]:
    if prompts:
        yield from prompts
    elif file is not None and not {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"} & set(file.suffixes):
        with file.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\r\n") for line in lines)
    elif file is not None:
        _quiet_data()
        from modeling_llm2slm.data.loading import load_prompts

        yield from load_prompts(file, prompt_column, skip_bad_rows=skip_bad_rows)["prompt"]
    else:
        if sys.stdin.isatty():
            err.print("One prompt a line; end with Ctrl-D.")
        yield from (line.rstrip("\r\n") for line in sys.stdin)


def _stream(text_to_text: TextToText, prompt: str, options: dict[str, Any]) -> None:
    for piece in text_to_text.stream(prompt, **options):
        out.file.write(_one_line(piece))
        out.file.flush()
    out.file.write("\n")
    out.file.flush()


def _print_batches(text_to_text: TextToText, prompts: Iterator[str], size: int, options: dict[str, Any]) -> None:
    from itertools import islice

    while batch := list(islice(prompts, 16 * size)):  # enough to put prompts of similar length together
        for answer in text_to_text.generate(batch, size, **options):
            out.file.write(_one_line(answer) + "\n")
        out.file.flush()


def _one_line(text: str) -> str:
    from modeling_llm2slm.inference.batching import one_line

    return one_line(text)


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests. Default: its folder's.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 16,
    max_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a batch waits for more prompts.")] = 5,
    max_queue: Annotated[int, typer.Option(min=1, help="Prompts that may wait; more are refused.")] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest prompt; default: the checkpoint's limit, or 2048.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer that may be asked for; default: 1024.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; above 1 nothing streams or is sampled.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is given up.")] = 120,
    shutdown_timeout: Annotated[float, typer.Option(min=1, help="Seconds to finish requests in, at the end.")] = 30,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """
    Answer prompts over HTTP, as OpenAI's completions: those that arrive together in one batch.

    `llm2slm serve runs/model --port 8000`

    `curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "A man sleeps."}'`

    There are /v1/completions (also streamed), /v1/models, /health and /metrics. Answers are greedy unless a request
    has a temperature. SIGTERM finishes what runs, and exits. There is no authentication: put a proxy before it.
    """
    from modeling_llm2slm.serving.server import ServeSettings, bind
    from modeling_llm2slm.serving.server import serve as serve_model

    settings = ServeSettings(
        name or Path(model).resolve().name, max_batch, max_wait / 1000, max_queue, max_prompt_tokens, max_new_tokens,
        num_beams=num_beams, timeout=timeout, shutdown_timeout=shutdown_timeout,
    )  # fmt: skip
    sock = bind(host, port)
    text_to_text = _load_model(model, device, quantize=quantize)
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    said = f"{settings.name} is served at {address}. Stop it with Ctrl-C."
    serve_model(text_to_text, settings, sock, lambda: out.print(said, soft_wrap=True, highlight=False))


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help="A .jsonl, .json, .csv, .parquet or .txt file, or a data set's name.")],
    prompt_column: PromptColumn = "prompt",
    target_column: AnswerColumn = "target",
    split: Annotated[str, typer.Option(help="Of a data set on the Hub.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Score this many pairs, from the top.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once; answers are timed one at a time.")] = 32,
    timed_outputs: Annotated[int, typer.Option(min=0, help="Time this many answers.")] = 50,
    against: Annotated[str | None, typer.Option(help="Compare with this LLM; references are not needed then.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="With --against: show this many that agree least.")] = 5,
    prompt_max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that are no text or too long, with a warning.")
    ] = False,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """
    Score a model's answers: BLEU and chrF (sacrebleu), ROUGE, exact match, and time per answer.

    `llm2slm evaluate runs/model test.jsonl --num-beams 4 --output metrics.json`

    `llm2slm evaluate runs/model prompts.txt --against google-t5/t5-large` tells how far it agrees with the LLM.
    """
    _check_output(output)
    text_to_text = _load_model(model, device, quantize=quantize, prompt_max_length=prompt_max_length)
    _quiet_data()
    if against is not None:
        from modeling_llm2slm.evaluation.agreement import compare

        comparison = compare(
            text_to_text, _load_model(against, device, prompt_max_length=prompt_max_length), data, prompt_column,
            target_column, split=split, limit=limit, batch_size=batch_size, timed_outputs=timed_outputs, worst=worst,
            skip_bad_rows=skip_bad_rows, **_decoding(max_new_tokens, num_beams),
        )  # fmt: skip
        comparison = {"model": model, "against": against, "data": Path(data).name, **comparison}
        _report(comparison, output, _print_comparison)
        return
    from modeling_llm2slm.evaluation.metrics import evaluate as evaluate_model

    result = evaluate_model(
        text_to_text, data, prompt_column, target_column, split=split, limit=limit, batch_size=batch_size,
        timed_outputs=timed_outputs, skip_bad_rows=skip_bad_rows, **_decoding(max_new_tokens, num_beams),
    )  # fmt: skip
    result = {"model": model, "data": Path(data).name, **result}
    _report(result, output, _print_result)


def _check_output(output: Path | None) -> None:
    if output is not None:
        from modeling_llm2slm.inference.files import check_writable

        check_writable(output)


def _report(result: dict[str, Any], output: Path | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Writes a result and shows it, also where it cannot be written: it took long."""
    from modeling_llm2slm.data.records import write_json

    try:
        if output is not None:
            write_json(output, result)
    finally:
        show(result)


def _print_comparison(result: dict[str, Any]) -> None:
    title = f"{result['prompts']} prompts of {result['data']}"
    table = Table("measure", "model", "LLM", "agreement", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, agreement in result["agreement"].items():
        scores = [result[key].get(name) for key in ("scores", "llm_scores")]
        table.add_row(name, *(f"{score:.2f}" if score is not None else "" for score in scores), f"{agreement:.2f}")
    for name, value in result["speed"].items():
        table.add_row(name, f"{value:.2f}", f"{result['llm_speed'][name]:.2f}", "")
    out.print(table)
    if result["speed_up"] is not None:
        out.print(f"The model answers {result['speed_up']:.2f} times as fast as the LLM.", highlight=False)
    for row in result["worst"]:
        out.print(f"\nchrF {row['chrf']:.1f}, row {row['row']}", highlight=False, style="bold")
        for name, text in (("prompt", row["prompt"]), ("model", row["target"]), ("LLM", row["llm_output"])):
            out.print(f"  {name:7} {escape(_one_line(text))}", soft_wrap=True, highlight=False)


def _print_result(result: dict[str, Any]) -> None:
    table = Table("measure", "value", title=f"{result['pairs']} pairs of {result['data']}")
    table.columns[1].justify = "right"
    for name, value in {**result["scores"], **result["speed"]}.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    out.print(table)
    for name, signature in result["signatures"].items():
        out.print(f"{name}: {signature}", soft_wrap=True, highlight=False)


@app.command()
def info(model: ModelArgument) -> None:
    """Tell what a checkpoint is: its kind, its parts and their sizes."""
    _print_model(model, _load_model(model))
    report = Path(model) / "training.json"
    if report.is_file():
        trained = json.loads(report.read_text(encoding="utf-8"))
        out.print(f"Trained {trained['steps']} steps in {trained['seconds']:.0f} s.", highlight=False)


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="The folder of a composite.", show_default=False)],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="What `llm2slm evaluate --output` wrote for this model; repeatable.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="The same for other models, for the table of times; repeatable.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="A language code, such as de; repeatable.")] = None,
    license: Annotated[str | None, typer.Option(help="Its licence. Default: that of LLM and SLM, if one.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="What it was trained on; repeatable.")] = None,
    task: Annotated[str, typer.Option(help="As the Hub calls it, such as translation.")] = "text-generation",
    name: Annotated[str | None, typer.Option(help="Its repository, for the snippet. Default: the folder.")] = None,
) -> None:
    """
    Write the model card anew, with scores and times.

    `llm2slm card runs/model --evaluation metrics.json --compare llm.json --language en --language de`
    """
    results = [[_read_json(file) for file in files or []] for files in (evaluation, compare)]
    text_to_text = _load_model(str(model))
    from modeling_llm2slm.data.files import atomic_write
    from modeling_llm2slm.training.model_card import is_by_hand, model_card

    if len(text_to_text.parts()) == 1:
        raise ValueError(f"{model} is not a composite of an LLM and an SLM, so there is no card to write.")
    file, report = model / "README.md", model / "training.json"
    if file.is_file() and is_by_hand(file.read_text(encoding="utf-8")):
        raise FileExistsError(f"{file} was written by hand. Move it away first.")
    details = {"language": language, "datasets": dataset} if dataset else {"language": language}
    text = model_card(
        text_to_text.model, name or model.name, license=license, pipeline_tag=task, evaluations=results[0],
        compared=results[1], training=_read_json(report) if report.is_file() else None, **details,
    )  # fmt: skip
    with atomic_write(file) as temporary:
        temporary.write_text(str(text), encoding="utf-8")
    out.print(f"The card is in {file}.", soft_wrap=True, highlight=False)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold a result of `llm2slm evaluate`.")
    return values


def _print_model(name: str, text_to_text: TextToText) -> None:
    table = Table("part", "model", "parameters", "width", "vocabulary", "dtype", title=escape(name))
    for part in text_to_text.parts():
        sizes = [str(getattr(part.config, key, "")) for key in ("hidden_size", "vocab_size")]
        kind = getattr(part.config, "model_type", "")
        table.add_row(part.name, kind, f"{part.parameters:,}", *sizes, part.dtype)
    out.print(table)
    counts = {name: f"{count:,}" for name, count in text_to_text.parameters().items()}
    out.print(
        f"{counts['total']} parameters, {counts['trainable']} trainable, {counts['decode']} used for each token."
    )


SourceArgument = Annotated[
    str, typer.Argument(help="A composite: a folder, or a name on the Hub.", show_default=False)
]
OutputArgument = Annotated[Path, typer.Argument(help="The folder to write to.", show_default=False)]
LLMOption = Annotated[str | None, typer.Option(help="Where the LLM is. Default: what the checkpoint says.")]
Force = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")]
Lean = Annotated[bool, typer.Option("--lean", help="Leave out the LLM, and say where it is.")]
ShardSize = Annotated[str, typer.Option(help="The largest file of weights.")]


@convert.command()
def compose(
    llm: Annotated[str, typer.Argument(help="The model that reads: a folder or a name on the Hub.")],
    slm: Annotated[str, typer.Argument(help="The model that writes: a folder or a name on the Hub.")],
    output: OutputArgument,
    fusion: Annotated[str, typer.Option(help="What the SLM reads: add or replace.")] = "add",
    encoder_layer: Annotated[int | None, typer.Option(help="Take the LLM's states from this layer.")] = None,
    encoder_dtype: Annotated[str | None, typer.Option(help="The LLM's dtype, such as bfloat16.")] = None,
    decoder_dtype: Annotated[str | None, typer.Option(help="The SLM's dtype.")] = None,
    encoder_revision: Annotated[str | None, typer.Option(help="The LLM's revision on the Hub.")] = None,
    decoder_revision: Annotated[str | None, typer.Option(help="The SLM's revision on the Hub.")] = None,
    max_shard_size: ShardSize = "1GB",
    force: Force = False,
) -> None:
    """
    Put an LLM and an SLM together, without ever holding them in memory.

    `llm2slm convert compose google-t5/t5-3b openai-community/gpt2 runs/start --encoder-dtype bfloat16`
    """
    _quiet(progress=True)
    from modeling_llm2slm.conversion import compose as convert_to

    revisions = {"encoder_revision": encoder_revision, "decoder_revision": decoder_revision}
    report = convert_to(
        llm, slm, output, force=force, max_shard_size=max_shard_size, encoder_dtype=encoder_dtype,
        decoder_dtype=decoder_dtype, fusion=fusion, encoder_layer=encoder_layer,
        **{name: revision for name, revision in revisions.items() if revision is not None},
    )  # fmt: skip
    _print_report(report)


@convert.command()
def lean(
    checkpoint: SourceArgument,
    output: OutputArgument,
    llm: LLMOption = None,
    revision: Annotated[str | None, typer.Option(help="The LLM's revision on the Hub.")] = None,
    force: Force = False,
) -> None:
    """
    Leave out the frozen LLM, and say where it is.

    `llm2slm convert lean runs/model runs/lean --llm google-t5/t5-large`
    """
    _quiet(progress=True)
    from modeling_llm2slm.conversion import lean as convert_to

    _print_report(convert_to(checkpoint, output, llm=llm, revision=revision, force=force))


@convert.command()
def full(
    checkpoint: SourceArgument,
    output: OutputArgument,
    llm: LLMOption = None,
    max_shard_size: ShardSize = "50GB",
    force: Force = False,
) -> None:
    """
    Take the LLM into a lean checkpoint.

    `llm2slm convert full runs/lean runs/full`
    """
    _quiet(progress=True)
    from modeling_llm2slm.conversion import full as convert_to

    _print_report(convert_to(checkpoint, output, llm=llm, force=force, max_shard_size=max_shard_size))


@convert.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter that peft saved.", show_default=False)],
    output: OutputArgument,
    base: Annotated[str | None, typer.Option(help="The composite. Default: what the adapter says.")] = None,
    lean: Lean = False,
    force: Force = False,
) -> None:
    """
    Add a LoRA adapter's weights to those of the composite it was trained on.

    `llm2slm convert merge runs/adapter runs/merged --base runs/model`
    """
    _quiet(progress=True)
    from modeling_llm2slm.conversion import merge as convert_to

    _print_report(convert_to(adapter, output, base=base, include_llm=not lean, force=force))


@convert.command()
def split(checkpoint: SourceArgument, output: OutputArgument, force: Force = False) -> None:
    """
    Take out the SLM as a plain checkpoint of its family, and the projector as a safetensors file.

    `llm2slm convert split runs/model runs/parts`
    """
    _quiet(progress=True)
    from modeling_llm2slm.conversion import split as convert_to

    _print_report(convert_to(checkpoint, output, force=force))


@convert.command("import")
def import_from(
    source: Annotated[str, typer.Argument(help="An EncoderDecoderModel; with --into, a safetensors file.")],
    output: OutputArgument,
    into: Annotated[str | None, typer.Option(help="The composite that takes in the projector of the file.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="JSON: names in the file to names here.")] = None,
    fusion: Annotated[str, typer.Option(help="Of the composite of an EncoderDecoderModel.")] = "add",
    lean: Lean = False,
    force: Force = False,
) -> None:
    """
    Take over what another composite trained, and say what has no place here.

    `llm2slm convert import runs/encoder-decoder runs/start`

    `llm2slm convert import mm_projector.safetensors runs/start --into runs/model --mapping names.json`
    """
    if into is None and (mapping is not None or lean):
        raise typer.BadParameter("--mapping and --lean belong to --into.")
    _quiet(progress=True)
    from modeling_llm2slm.conversion import import_encoder_decoder, import_projector

    if into is None:
        _print_report(import_encoder_decoder(source, output, fusion=fusion, force=force))
    else:
        _print_report(import_projector(source, into, output, mapping=mapping, include_llm=not lean, force=force))


def _print_report(report: Report) -> None:
    table = Table("what", "result", title=escape(report.title), title_justify="left")
    for what, result in report.rows:
        table.add_row(escape(what), escape(result))
    out.print(table)


def _load_model(
    path: str,
    device: str = "cpu",
    seed: int | None = None,
    quantize: str | None = None,
    prompt_max_length: int | None = None,
) -> TextToText:
    _quiet()
    from transformers import set_seed

    from modeling_llm2slm.inference.text_to_text import TextToText

    if seed is not None:
        set_seed(seed)
    return TextToText.from_pretrained(path, device=device, prompt_max_length=prompt_max_length, quantize=quantize)


def _quiet(progress: bool = False) -> None:
    """Keeps the libraries' notes to their developers, and the progress bars of short work, from the user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()


def _quiet_data() -> None:
    from datasets import disable_progress_bars

    disable_progress_bars()
