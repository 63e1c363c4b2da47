"""What the Trainer needs for a recipe, checked before anything is loaded."""

from __future__ import annotations

import torch
from transformers import Seq2SeqTrainingArguments, Trainer, get_scheduler, integrations

from ..settings import shown
from .recipe import Recipe, RecipeError, cause_of


# The packages of the integrations that are not named like them.
REPORT_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_trainable(ours: Recipe, arguments: Seq2SeqTrainingArguments) -> None:
    """
    Raise [`RecipeError`], before anything is loaded, if the Trainer could not make the optimizer or the learning rate
    schedule, or if a package that `report_to` names is not installed.
    """
    _check_optimizer(ours, arguments)
    _check_schedule(arguments)
    for name in arguments.report_to:
        if name not in integrations.get_available_reporting_integrations():
            package = REPORT_PACKAGES.get(name, name)
            raise RecipeError(
                f"report_to has {name!r}, which is not installed. Try: pip install {package}, or set report_to: none."
            )


def _check_optimizer(ours: Recipe, arguments: Seq2SeqTrainingArguments) -> None:
    try:
        if ours.optimizer == "adamw":
            Trainer.get_optimizer_cls_and_kwargs(arguments)
    except Exception as error:  # each optimizer raises its own exceptions
        if "need to pass a model" in str(error):  # its other arguments are right
            return
        raise RecipeError(f"optim is {arguments.optim.value!r}, which cannot be used: {cause_of(error)}.") from error


def _check_schedule(arguments: Seq2SeqTrainingArguments) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=arguments.learning_rate)
    options = arguments.lr_scheduler_kwargs
    try:
        get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 1000, options)
    except Exception as error:  # each schedule raises its own exceptions
        raise RecipeError(
            f"lr_scheduler_kwargs is {shown(options)}, which the schedule {arguments.lr_scheduler_type.value!r} "
            f"refuses: {cause_of(error)}."
        ) from error
