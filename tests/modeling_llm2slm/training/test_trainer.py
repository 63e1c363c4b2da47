"""Our Trainer: generated validation, the order of the data, full disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from torch.nn.modules.module import _IncompatibleKeys

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.training.model import load_to_train
from modeling_llm2slm.training.recipe import parse_recipe
from modeling_llm2slm.training.run import make_trainer, train
from modeling_llm2slm.training.trainer import TextToTextTrainer


@pytest.mark.parametrize("asked", [{}, {"do_sample": True}])
def test_validation_samples_only_with_do_sample(recipe, monkeypatch, asked):
    seen = []
    monkeypatch.setattr(
        TextToText, "generate", lambda self, prompts, *_, **kwargs: seen.append(kwargs) or ["src1"] * len(prompts)
    )
    train({**recipe, "max_steps": 1, "generation": {"max_new_tokens": 8, **asked}})
    assert seen[0] == {"do_sample": False, "max_new_tokens": 8, **asked}


def test_length_groups_depend_on_the_effective_batch_size(recipe):
    """However a step is split into batches, a resumed epoch reads the examples that are left of it."""
    orders = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4), (2, 1)):
        ours, arguments = parse_recipe(
            {
                **recipe, "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulated,
            }
        )  # fmt: skip
        orders.append(list(make_trainer(ours, arguments, load_to_train(ours))._get_train_sampler()))
    assert orders[0] == orders[1] == orders[2] != orders[3]


def test_checkpoint_on_a_full_disk_raises_an_error_that_names_it(recipe, monkeypatch):
    def save(state: Any, path: str) -> None:
        monkeypatch.undo()
        torch.save(state, "/dev/full")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="its disk may be full. Free disk space and repeat the command"):
        train(recipe)
    assert train(recipe)["resumed_at_step"] is None


@pytest.mark.parametrize("kind", ["llm", "llm2slm"])
def test_tied_weights_are_not_reported_as_missing(checkpoints, kind, monkeypatch):
    model = TextToText.from_pretrained(checkpoints[kind]).model
    held = set().union(*(safetensors.safe_open(file, "pt").keys() for file in Path(checkpoints[kind]).glob("*.safe*")))
    tied = [name for name in model.state_dict() if name not in held]
    assert tied
    own, reported = object.__new__(TextToTextTrainer), []
    own.model = model
    monkeypatch.setattr(transformers.trainer.logger, "warning", reported.append)
    own._issue_warnings_after_load(_IncompatibleKeys(tied, []))
    assert not reported
    own._issue_warnings_after_load(_IncompatibleKeys([*tied, "some.weight"], []))
    assert "['some.weight']" in reported[0]
