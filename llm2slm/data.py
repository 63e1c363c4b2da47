"""Commands that prepare training: `encode` and `distill`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import local_device, quiet_libraries
from .options import ModelArgument, with_settings
from .output import count_of, print_line, print_note, resumable, size
from .progress import counting


if TYPE_CHECKING:
    from modeling_llm2slm.settings import DistillSettings, EncodeSettings, RaySettings

PANEL = "Data"
commands = typer.Typer()


@commands.command(rich_help_panel=PANEL)
@with_settings
@resumable
def encode(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Argument(
            help="All data to train and validate on: files, folders, addresses such as s3://..., or names on the Hub."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder of the store.", show_default=False)],
    settings: EncodeSettings,
    ray: RaySettings,
) -> None:
    """
    Run the LLM over all prompts once, and store its hidden states for training.

    `llm2slm encode runs/start train.jsonl val.jsonl --output runs/states`

    `llm2slm train recipe.yaml --llm-states runs/states` then loads no LLM. An interrupted run resumes;
    `torchrun --nproc_per_node 8 -m llm2slm encode ...` shares the work among eight devices, `--ray` among machines.
    """
    quiet_libraries(data=True)
    from modeling_llm2slm.states.encoding import encode as encode_prompts

    settings = replace(settings, device=local_device(settings.device))
    with counting("prompts") as count:
        progress = partial(count, "Encoding")
        encode_prompts(model, data, output, settings, ray=ray, announce=_announce_store, progress=progress)
    print_line(f"The hidden states are in {output}. Train with: --llm-states {output}")


def _announce_store(description: Any, bytes_to_write: int) -> None:
    total = description.nbytes
    to_write = f", {size(bytes_to_write)} of it still to be written" if bytes_to_write != total else ""
    print_note(
        f"{count_of(description.prompts, 'different prompt')} of {count_of(description.tokens, 'token')}, "
        f"{description.hidden_size} "
        f"numbers each in {description.dtype}: {size(total)}{to_write}."
    )


@commands.command(rich_help_panel=PANEL)
@with_settings
@resumable
def distill(
    llm: Annotated[str, typer.Argument(help="The LLM with its decoder: a folder, or a name on the Hub.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Prompts: a file, a folder of .parquet or .jsonl, an address such as s3://..., or a data set's name."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The .jsonl or .jsonl.gz to write.", show_default=False)],
    settings: DistillSettings,
    ray: RaySettings,
) -> None:
    """
    Let the LLM generate targets to train on, in a column of their own.

    `llm2slm distill google-t5/t5-large train.jsonl --output distilled.jsonl --max-new-tokens 64`

    A recipe with `target-column: llm_output` trains on them, one with `target-column: [target, llm_output]` on both
    columns. An interrupted run resumes. `--ray` shares the work among machines.
    """
    quiet_libraries(data=True)
    from modeling_llm2slm.training.distillation import distill as write_targets

    settings = replace(settings, device=local_device(settings.device))
    with counting("prompts") as count:
        examples = write_targets(llm, data, output, settings, ray=ray, progress=partial(count, "Distilling"))
    be = "is" if examples == 1 else "are"
    print_line(f"{count_of(examples, 'example')} {be} in {output}, the LLM's outputs in column {settings.column}.")
