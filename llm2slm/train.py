"""Commands that train: `train` and `speedup`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .evaluate import print_comparison
from .loading import local_device, quiet_libraries
from .options import extra_options, with_settings
from .output import print_line
from .progress import counting


if TYPE_CHECKING:
    from modeling_llm2slm.settings import SpeedupSettings

PANEL = "Training"
commands = typer.Typer()


@commands.command(rich_help_panel=PANEL, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
) -> None:
    """
    Train a checkpoint as a recipe says.

    `llm2slm train recipe.yaml --num-train-epochs 5 --output-dir runs/five`

    A recipe holds `model`, `train_data`, `output_dir`, and any of `validation_data`, `train_split`, `validation_split`
    (of data sets on the Hub), `prompt_column`, `target_column`, `prompt_max_length`, `target_max_length`,
    `train_samples`, `validation_samples`, `optimizer`, `metric`, `generation`, `resume`, `llm_states`,
    `learning_rate_mapping`, `lora`, `quantize_llm`, `skip_bad_rows`, `streaming`, `shuffle_buffer`,
    `preprocessing_num_workers`, and every field of transformers' Seq2SeqTrainingArguments. Each is an option of this
    command as well, which overrides the recipe. A run that was interrupted resumes. On several devices:
    `accelerate launch --config_file FILE -m llm2slm train recipe.yaml`.
    """
    overrides = dict(extra_options(context.args))
    quiet_libraries(data=True)
    from modeling_llm2slm.training.training import load_recipe
    from modeling_llm2slm.training.training import train as train_model

    settings = load_recipe(recipe, overrides)
    report = train_model(settings)
    print_line(f"Trained {report['steps']} steps in {report['seconds']:.0f} s.")
    if report["best_metric"] is not None:
        print_line(f"Best validation {report['metric']}: {report['best_metric']:.4g} at step {report['best_step']}.")
    print_line(f"The model is in {os.path.expandvars(str(settings['output_dir']))}.")


@commands.command(rich_help_panel=PANEL, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@with_settings
def speedup(
    context: typer.Context,
    llm: Annotated[str, typer.Option(help="The LLM with its decoder: a folder, or a name on the Hub.")],
    prompts: Annotated[str, typer.Option(help="Prompts: .txt, .jsonl, .csv, .parquet, or a data set on the Hub.")],
    settings: SpeedupSettings,
    output: Annotated[Path, typer.Option(help="The folder for everything.")] = Path("runs/speedup"),
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """
    From an LLM and prompts to a model that can be served: distill, build, encode, train, evaluate.

    `llm2slm speedup --llm google-t5/t5-large --prompts prompts.txt --output runs/fast --num-train-epochs 3`

    Every field of a recipe but its paths is an option as well. A run that was interrupted resumes; each stage shows
    the command that does the same.
    """
    from dataclasses import replace

    quiet_libraries(data=True)
    from modeling_llm2slm.workflows.speedup import Speedup

    settings = replace(settings, llm=llm, prompts=prompts, recipe=dict(extra_options(context.args)))

    with counting("prompts") as count:
        run = Speedup(settings, output, local_device(device), count)
        result = run.run(lambda stage, command: print_line(f"{stage}  {command}"))
    print_comparison({"data": "test.jsonl", **result})
    print_line(f"The model is in {output}/model.")
