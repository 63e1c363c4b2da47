"""A learning rate for each part, in stock optimizers and stock `Trainer`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

from modeling_llm2slm import parameter_groups
from modeling_llm2slm.training.optimization import relative_adafactor
from tests.support.common import PROMPTS, build_model, make_labels, pad_prompts


def rates_by_name(model: torch.nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_first_matching_pattern_sets_the_learning_rate_of_every_trained_parameter() -> None:
    model = build_model("add").train()
    groups = parameter_groups(model, 1e-4, {r"projector\.linear_1": 1e-2, "projector": 1e-3}, weight_decay=0.1)
    rates = rates_by_name(model, groups)
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rates["encoder.projector.linear_1.weight"] == (1e-2, 0.1)
    assert rates["encoder.projector.linear_1.bias"] == (1e-2, 0.0)
    assert rates["encoder.projector.linear_2.weight"] == (1e-3, 0.1)
    assert rates["encoder.prompt_embedding.weight"] == (1e-4, 0.1)
    assert rates["decoder.transformer.h.0.ln_1.weight"] == (1e-4, 0.0)
    assert not [name for name in rates if ".llm." in name]


def test_weight_decay_applies_where_the_trainer_applies_it(tmp_path: Path) -> None:
    model = build_model("add").train()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1))
    expected = {
        name: decay["weight_decay"] for name, decay in _trainer_groups(model, trainer.create_optimizer()).items()
    }
    ours = rates_by_name(model, parameter_groups(model, 1e-4, weight_decay=0.1))
    assert {name: decay for name, (_, decay) in ours.items()} == expected


def _trainer_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_learning_rate_that_yaml_reads_as_text_is_a_number() -> None:
    groups = parameter_groups(build_model("add").train(), 1e-4, yaml.safe_load("{projector: 1e-3}"))
    assert {group["lr"] for group in groups} == {1e-4, 1e-3}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"projektor": 1.0}, "'projektor', which matches no parameter that trains"),
        ({"encoder.llm": 1.0}, "matches no parameter that trains"),
        ({"projector": 1.0, "linear_1": 1.0}, "'linear_1'.*no pattern before it"),
        ({"(": 1.0}, "not a regular expression"),
        ({"projector": "fast"}, "'fast' for 'projector', but it must be a number"),
    ],
)
def test_pattern_without_effect_is_an_error(mapping: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(build_model("add").train(), 1e-4, mapping)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_parts_move_by_their_own_learning_rates(optimizer: str) -> None:
    start = build_model("add").state_dict()

    def moved(mapping: dict[str, float]) -> dict[str, float]:
        model = build_model("add").train()
        groups = parameter_groups(model, 1e-4, mapping)
        made = torch.optim.AdamW(groups) if optimizer == "adamw" else relative_adafactor(groups)
        torch.manual_seed(0)
        model(**pad_prompts(PROMPTS), labels=make_labels()).loss.backward()
        made.step()
        after = model.state_dict()
        names = {"projector": "encoder.projector.linear_2.weight", "slm": "decoder.transformer.h.0.mlp.c_fc.weight"}
        return {part: float((after[name] - start[name]).norm()) for part, name in names.items()}

    equal, faster = moved({}), moved({"projector": 1e-3})
    assert faster["slm"] == pytest.approx(equal["slm"], rel=1e-3)
    assert faster["projector"] == pytest.approx(10 * equal["projector"], rel=1e-2)


def test_stock_trainer_schedules_every_learning_rate(tmp_path: Path) -> None:
    model = build_model("add")
    groups = parameter_groups(model.train(), 1e-4, {"projector": 1e-3})
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", max_steps=2, lr_scheduler_type="linear", disable_tqdm=True
        ),
        train_dataset=[{**{k: v[0] for k, v in pad_prompts(PROMPTS[:1]).items()}, "labels": make_labels(1)[0]}] * 4,
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.train()
    rates = {round(group["initial_lr"], 6): group["lr"] for group in trainer.optimizer.param_groups}
    assert set(rates) == {1e-4, 1e-3}
    assert all(rate == 0 for rate in rates.values())
