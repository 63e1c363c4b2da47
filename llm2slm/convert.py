"""Commands that convert a checkpoint to another form: the group `convert`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .loading import quiet_libraries
from .options import OutputArgument, Overwrite, with_settings
from .output import out
from .progress import counting, steps


if TYPE_CHECKING:
    from modeling_llm2slm.conversion.report import Report
    from modeling_llm2slm.settings import CorpusSettings, PruneSettings

PANEL = "Checkpoints"
commands = typer.Typer()
convert = typer.Typer(
    help="Convert a checkpoint to another form; each result is loaded and compared before it replaces anything.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
commands.add_typer(convert, name="convert", rich_help_panel=PANEL)

CheckpointArgument = Annotated[
    str, typer.Argument(help="An LLM-to-SLM checkpoint: a folder, or a name on the Hub.", show_default=False)
]
PlainArgument = Annotated[
    str,
    typer.Argument(
        help="A decoder-only or encoder-decoder model: a folder, or a name on the Hub.", show_default=False
    ),
]
LLMOption = Annotated[
    str | None,
    typer.Option(help="The LLM: a folder, or a name on the Hub. Default: the one that the checkpoint names."),
]
LeanSwitch = Annotated[bool, typer.Option("--lean", help="Leave out the LLM, and record where it is.")]


@convert.command()
def lean(
    checkpoint: CheckpointArgument,
    output: OutputArgument,
    llm: LLMOption = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the LLM on the Hub.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """
    Leave out the frozen LLM, and record where it is.

    `llm2slm convert lean runs/model runs/lean --llm google-t5/t5-large`
    """
    _convert("lean", "lean", checkpoint, output, llm=llm, revision=revision, overwrite=overwrite)


@convert.command()
def full(
    checkpoint: CheckpointArgument,
    output: OutputArgument,
    llm: LLMOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file.")] = "50GB",
    overwrite: Overwrite = False,
) -> None:
    """
    Add the LLM to a lean checkpoint.

    `llm2slm convert full runs/lean runs/full`
    """
    _convert("lean", "full", checkpoint, output, llm=llm, max_shard_size=max_shard_size, overwrite=overwrite)


@convert.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder that peft saved the adapter to.", show_default=False)],
    output: OutputArgument,
    base: Annotated[
        str | None, typer.Option(help="The LLM-to-SLM checkpoint. Default: the one that the adapter names.")
    ] = None,
    lean: LeanSwitch = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Merge a LoRA adapter into the checkpoint that it was trained on.

    `llm2slm convert merge runs/adapter runs/merged --base runs/model`
    """
    _convert("merge", "merge", adapter, output, base=base, include_llm=not lean, overwrite=overwrite)


@convert.command()
def split(checkpoint: CheckpointArgument, output: OutputArgument, overwrite: Overwrite = False) -> None:
    """
    Extract the SLM as a plain checkpoint of its family, and the projector as a safetensors file.

    `llm2slm convert split runs/model runs/parts`
    """
    _convert("split", "split", checkpoint, output, overwrite=overwrite)


@convert.command("import")
def import_from(
    source: Annotated[str, typer.Argument(help="An EncoderDecoderModel; with --into, a safetensors file.")],
    output: OutputArgument,
    into: Annotated[
        str | None, typer.Option(help="The LLM-to-SLM checkpoint that takes the projector of the file.")
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(help="With --into: a JSON file from names in the file to names in the checkpoint."),
    ] = None,
    fusion: Annotated[
        str, typer.Option(help="Fusion of the result of an EncoderDecoderModel: add, or replace.")
    ] = "add",
    lean: LeanSwitch = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Import trained weights of another composite model, and list those that could not be imported.

    `llm2slm convert import runs/encoder-decoder runs/start`

    `llm2slm convert import mm_projector.safetensors runs/start --into runs/model --mapping names.json`
    """
    if into is None and (mapping is not None or lean):
        raise typer.BadParameter("--mapping and --lean belong to --into.")
    if into is None:
        _convert("importing", "import_encoder_decoder", source, output, fusion=fusion, overwrite=overwrite)
    else:
        options: dict[str, Any] = {"mapping": mapping, "include_llm": not lean, "overwrite": overwrite}
        _convert("importing", "import_projector", source, into, output, **options)


@convert.command("prune-vocabulary")
@with_settings
def prune_vocabulary(
    llm: PlainArgument,
    output: OutputArgument,
    corpus: Annotated[
        list[str], typer.Option(help="A file, or a data set on the Hub; may be repeated.", show_default=False)
    ],
    settings: PruneSettings,
    overwrite: Overwrite = False,
) -> None:
    """
    Keep only the tokens that a corpus uses, in the tokenizer and in the embeddings.

    `llm2slm convert prune-vocabulary google/gemma-3-270m runs/pruned --corpus train.jsonl`

    The corpus keeps its tokens and their logits. Other texts are written in shorter tokens, without loss.
    """
    _convert("prune_vocabulary", "prune_vocabulary", llm, output, corpus, settings, overwrite=overwrite)


@convert.command()
@with_settings
def cut(
    llm: PlainArgument,
    output: OutputArgument,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to keep, from 0, such as 0,5,11,17; or their number, such as 4.", show_default=False
        ),
    ],
    settings: CorpusSettings,
    data: Annotated[
        str | None,
        typer.Option(
            help="Prompts and targets that choose the layers of a decoder-only LLM: a file, or a data set on the Hub. "
            "Default: a number keeps layers at even distances."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """
    Make an SLM of some layers of an LLM.

    `llm2slm convert cut google/gemma-3-270m runs/slm --layers 0,5,11,17`

    `llm2slm convert cut runs/llm runs/slm --layers 6 --data distilled.jsonl --target-column llm_output`

    An encoder-decoder LLM keeps its encoder, and its decoder is cut.
    """
    try:
        numbers = [int(number) for number in layers.split(",") if number]
    except ValueError as error:
        raise typer.BadParameter(f"--layers is {layers[:50]!r}, but it must be numbers, such as 0,5,11,17.") from error
    chosen = numbers if "," in layers or not numbers else numbers[0]
    _convert("cut", "cut_checkpoint", llm, output, chosen, data, settings, overwrite=overwrite, counted=bool(data))


def _convert(module: str, conversion: str, *arguments: Any, counted: bool = False, **options: Any) -> None:
    quiet_libraries(data=module in ("prune_vocabulary", "cut"))
    function: Callable[..., Report] = getattr(import_module(f"modeling_llm2slm.conversion.{module}"), conversion)
    if counted:
        with counting("layers left out") as count:
            report = function(*arguments, **options, progress=partial(count, "Choice"))
    else:
        with steps("Conversion"):
            report = function(*arguments, **options)
    print_report(report)


def print_report(report: Report) -> None:
    """Print what a conversion did and checked."""
    table = Table("what", "result", title=escape(report.title), title_justify="left")
    for what, result in report.rows:
        table.add_row(escape(what), escape(result))
    out.print(table)
