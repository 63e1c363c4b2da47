"""Commands that train: `train` and `speedup`. The fields of a recipe are their options."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from .evaluate import print_comparison
from .loading import local_device, quiet_libraries
from .options import extra_options, load_module, with_settings
from .output import count_of, is_quiet, print_line, resumable
from .progress import counting


if TYPE_CHECKING:
    from modeling_llm2slm.settings import SpeedupSettings

PANEL = "Training"
EXTRA_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

WIDEST_CHOICES = 20  # characters

commands = typer.Typer()


class RecipeCommand(TyperCommand):
    """A command whose help also shows the fields of a recipe, from its schema."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's own options and those of the recipe, which are created only when they are needed."""
        schema = load_module("modeling_llm2slm.training.recipe")
        return [*super().get_params(ctx), *_recipe_options(self.shown(schema.recipe_fields()))]

    def shown(self, fields: list[Any]) -> list[Any]:
        """Return the fields that the help shows."""
        return fields


class SpeedupCommand(RecipeCommand):
    """A [`RecipeCommand`] without the fields that a speed-up sets itself."""

    def shown(self, fields: list[Any]) -> list[Any]:
        return [field for field in fields if field.speedup]


def _recipe_options(fields: Sequence[Any]) -> list[Any]:
    """
    Return options that the help shows. The parser does not know them: it leaves them in `context.args`, together with
    fields of the Trainer, and the schema of recipes validates both.
    """

    def recipe(**values: Any) -> None:
        pass

    parameters = [_parameter(field) for field in fields]
    recipe.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    recipe.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(recipe)
    options: list[Any] = list(typer.main.get_command(app).params)
    for option in options:
        option.add_to_parser = lambda parser, ctx: None
        option.expose_value = False
    return options


def _parameter(field: Any) -> inspect.Parameter:
    default = ",".join(field.default) if isinstance(field.default, list) else field.default
    kind = _shortened(field.type.replace(" ", ""))
    option = typer.Option(
        f"--{field.name.replace('_', '-')}",
        help=field.description.replace("`", ""),
        metavar=f"[{kind}]" if "|" in kind else f"<{kind}>",
        rich_help_panel=f"Recipe: {field.group.lower()}",
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=str(default).lower() if default not in (None, {}, False) else None,
        annotation=Annotated[str | None, option],
    )


def _shortened(choices: str) -> str:
    """Return choices that fit the column of a table: `loss|bleu|...`. A longer text would break inside a word."""
    names = choices.split("|")
    while len("|".join(names)) > WIDEST_CHOICES:
        names = [*names[: -2 if names[-1] == "..." else -1], "..."]
    return "|".join(names)


@commands.command(cls=SpeedupCommand, rich_help_panel=PANEL, context_settings=EXTRA_OPTIONS)
@with_settings
@resumable
def speedup(
    context: typer.Context,
    settings: SpeedupSettings,
    output: Annotated[Path, typer.Option(help="Output folder for all stages.")] = Path("runs/speedup"),
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """
    Turn an LLM and prompts into a model to serve: distill, build, encode, train, evaluate.

    `llm2slm speedup --llm google-t5/t5-large --prompts prompts.txt --output runs/fast --num-train-epochs 3`

    The options of the recipe below, and every field of transformers' Seq2SeqTrainingArguments, override the recipe of
    the training. An interrupted run resumes; each stage shows the command that does the same.
    """
    recipe = dict(extra_options(context.args))
    quiet_libraries(data=True)
    from modeling_llm2slm.data.records import check_fields
    from modeling_llm2slm.evaluation.agreement import COMPARISON
    from modeling_llm2slm.workflows.speedup import EVALUATE_AGAIN, Speedup

    settings = replace(settings, recipe=recipe)
    with counting("prompts", cut="layers left out") as count:
        run = Speedup(settings, output, local_device(device), count, is_quiet())
        result = run.run(lambda stage, command: print_line(f"{stage}  {command}"))
    check_fields(output / "evaluation.json", result, EVALUATE_AGAIN, COMPARISON)
    print_comparison({"data": "test.jsonl", **result})
    print_line(f"The model is in {output}/model.")


@commands.command(cls=RecipeCommand, rich_help_panel=PANEL, context_settings=EXTRA_OPTIONS)
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
) -> None:
    """
    Train a model from a YAML recipe.

    `llm2slm train recipe.yaml --num-train-epochs 5 --output-dir runs/five`

    A recipe must have `model`, `train_data` and `output_dir`. The options below override its fields, and so does every
    field of transformers' Seq2SeqTrainingArguments, such as `--learning-rate 1e-3`: the reference page on recipes
    lists them. An interrupted run resumes. On several devices:
    `accelerate launch --config_file FILE -m llm2slm train recipe.yaml`.
    """
    overrides = dict(extra_options(context.args))
    quiet_libraries(data=True)
    from modeling_llm2slm.training.recipe import RecipeError, load_recipe
    from modeling_llm2slm.training.resuming import what_resumes
    from modeling_llm2slm.training.run import train as train_model

    settings = load_recipe(recipe, overrides)
    try:
        report = train_model(settings, is_quiet())
    except KeyboardInterrupt:
        resumes = str(settings.get("resume", True)).lower() != "false"
        output_dir = os.path.expandvars(str(settings["output_dir"]))
        raise KeyboardInterrupt(f"Interrupted. {what_resumes(output_dir, resumes)}") from None
    except RecipeError as error:
        by_option = str(error).partition(" ")[0].partition(".")[0] in overrides
        raise ValueError(str(error) if by_option else f"{recipe}: {error}") from error
    if report.get("already_trained"):  # a warning has said so
        return
    print_line(f"Trained {count_of(report['steps'], 'step')} in {report['seconds']:.0f} s.")
    if report["best_metric"] is not None:
        print_line(f"Best validation {report['metric']}: {report['best_metric']:.4g} at step {report['best_step']}.")
    print_line(f"The model is in {os.path.expandvars(str(settings['output_dir']))}.")
