"""Commands on one checkpoint: `build`, `info`, `card` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .convert import print_report
from .loading import load_text_to_text, quiet_libraries
from .options import ModelArgument, OutputArgument, Overwrite, with_settings
from .output import count_of, number_table, out, print_line
from .progress import steps


if TYPE_CHECKING:
    from modeling_llm2slm.inference.text_to_text import TextToText
    from modeling_llm2slm.settings import BuildSettings, CardSettings

PANEL = "Checkpoints"
commands = typer.Typer()


@commands.command(rich_help_panel=PANEL)
@with_settings
def build(
    output: OutputArgument,
    settings: BuildSettings,
    llm: Annotated[str | None, typer.Option(help="The LLM: a folder, a name on the Hub, or a config .json.")] = None,
    slm: Annotated[str | None, typer.Option(help="The SLM: a folder, a name on the Hub, or a config .json.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A preset that replaces both, such as t5-large_gpt2, or an llm2slm config .json: random weights."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """
    Build a checkpoint of an LLM and an SLM, or of one of them alone.

    `llm2slm build runs/start --llm google-t5/t5-large --slm openai-community/gpt2`

    Two pretrained models are composed without loading them into memory. A config file in place of a model gives random
    weights of that shape. With `--llm` alone the result is a plain encoder-decoder model, with `--slm` alone a plain
    decoder-only model.
    """
    quiet_libraries()
    from modeling_llm2slm.conversion.build import build as build_in_memory
    from modeling_llm2slm.conversion.build import is_config
    from modeling_llm2slm.conversion.compose import compose
    from modeling_llm2slm.data.atomic import atomic_write
    from modeling_llm2slm.data.output_paths import claimed

    if llm and slm and not preset and not is_config(llm) and not is_config(slm):
        with steps("Build") as progress:
            report = compose(llm, slm, output, settings, overwrite=overwrite, progress=progress)
        print_report(report)
        return
    sources = llm, slm, preset, settings.llm_tokenizer, settings.slm_tokenizer
    with claimed(output, folder=True, overwrite=overwrite, inputs=sources):
        text_to_text = build_in_memory(llm, slm, settings, preset=preset)
        options = {"card": {"name": output.name}} if text_to_text.is_llm2slm else {}
        with atomic_write(output, keep=not overwrite) as folder:
            text_to_text.save_pretrained(folder, max_shard_size=settings.max_shard_size, **options)
    print_model(str(output), text_to_text)


@commands.command(rich_help_panel=PANEL)
def info(model: ModelArgument) -> None:
    """
    Show what a checkpoint is: its kind, its parts and their sizes.

    `llm2slm info runs/model`
    """
    quiet_libraries()
    from modeling_llm2slm.inference.engine import DEFAULT, engine_of

    options: dict[str, Any] = {"dtype": "auto"} if engine_of(model).name == DEFAULT else {}  # shows the dtype stored
    print_model(model, load_text_to_text(model, **options))
    if (trained := _read_report(model)) is not None:
        print_line(f"Trained {count_of(trained['steps'], 'step')} in {trained['seconds']:.0f} s.")


@commands.command(rich_help_panel=PANEL)
@with_settings
def card(
    model: Annotated[Path, typer.Argument(help="The folder of an LLM-to-SLM checkpoint.", show_default=False)],
    settings: CardSettings,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="A result of `llm2slm evaluate --output` for this model; repeatable.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="A result for another model, for the table of times; repeatable.")
    ] = None,
) -> None:
    """
    Write the model card again, with scores and times.

    `llm2slm card runs/model --evaluation metrics.json --compare llm.json --language en --language de`
    """
    evaluations, compared = ([_read_result(file) for file in files or []] for files in (evaluation, compare))
    text_to_text = load_text_to_text(str(model))
    from modeling_llm2slm.data.atomic import atomic_write
    from modeling_llm2slm.data.output_paths import locked
    from modeling_llm2slm.inference.model_card import (
        EVAL_RESULTS,
        CardDetails,
        eval_results,
        is_by_hand,
        model_card,
    )

    if not text_to_text.is_llm2slm:
        raise ValueError(f"{model} is not an LLM-to-SLM checkpoint; only these get a card.")
    file = model / "README.md"
    if file.is_file() and is_by_hand(file.read_text(encoding="utf-8", errors="replace")):
        raise FileExistsError(f"{file} was written by hand. Move it away first.")
    details = CardDetails(
        language=settings.language, license=settings.license, datasets=settings.dataset or None,
        pipeline_tag=settings.task, evaluations=evaluations, compared=compared, training=_read_report(model),
    )  # fmt: skip
    contents = {file: str(model_card(text_to_text.model, settings.name or model.name, details))}
    if settings.leaderboard is not None:
        contents[model / EVAL_RESULTS] = eval_results(evaluations, settings.leaderboard)
    for path, content in contents.items():
        with locked(path), atomic_write(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print_line(f"The card is in {file}.")


@commands.command(rich_help_panel=PANEL)
def export(
    model: ModelArgument,
    output: OutputArgument,
    engine: Annotated[
        str, typer.Option(help="An installed engine that exports, such as openvino, onnx or inductor.")
    ] = "openvino",
    weights: Annotated[str, typer.Option(help="A weight format of the engine, such as fp32 or int8.")] = "fp32",
    overwrite: Overwrite = False,
) -> None:
    """
    Export an LLM-to-SLM or decoder-only checkpoint to an engine that is faster than PyTorch on a CPU.

    `llm2slm export runs/model runs/fast --engine openvino --weights int8`

    `llm2slm generate`, `evaluate` and `info` read the result like any checkpoint. It is loaded and compared with
    PyTorch before it replaces anything.
    """
    quiet_libraries()
    from modeling_llm2slm.conversion.export import export as export_checkpoint

    with steps("Export") as progress:
        report = export_checkpoint(
            model, output, engine=engine, weights=weights, overwrite=overwrite, progress=progress
        )
    print_report(report)


def print_model(name: str, text_to_text: TextToText) -> None:
    """Print the parts of a model and their sizes."""
    table = number_table("part", "model", "parameters", "width", "vocabulary", "dtype", title=escape(name))
    table.columns[1].justify = table.columns[5].justify = "left"
    for part in text_to_text.parts():
        sizes = [str(getattr(part.config, key, "")) for key in ("hidden_size", "vocab_size")]
        kind = getattr(part.config, "model_type", "")
        table.add_row(part.name, kind, f"{part.parameters:,}", *sizes, part.dtype)
    out.print(table)
    counts = {name: f"{count:,}" for name, count in text_to_text.parameters().items()}
    print_line(
        f"{counts['total']} parameters, {counts['trainable']} trainable, {counts['decode']} used for each token."
    )


def _read_result(file: Path) -> dict[str, Any]:
    from modeling_llm2slm.data.causes import no_file
    from modeling_llm2slm.data.records import MAPPING, NUMBER, mapping_to, read_record

    if not file.is_file():
        raise no_file(file)
    fields = {"scores": mapping_to(NUMBER), "speed": mapping_to(NUMBER), "signatures": MAPPING}
    fix = "Write it again: llm2slm evaluate --output."
    return read_record(file, fix, fields, optional=True, what="a result of `llm2slm evaluate`")


def _read_report(model: str | Path) -> dict[str, Any] | None:
    """Return the report of the training of a model, or `None` if there is none."""
    from modeling_llm2slm.data.records import COUNT, MAPPING, NUMBER, read_record

    file = Path(model) / "training.json"
    if not file.is_file():
        return None
    fields = {"steps": COUNT, "seconds": NUMBER, "trained_parameters": COUNT, "recipe": MAPPING}
    return read_record(file, "Restore or remove it.", fields, what="the report of a training")
