"""The ablation of projected hidden states: its rows, and what its variants change."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from benchmarks.projected_states import LLM, TASK, VARIANTS, ProjectedStates, fold
from modeling_llm2slm.training.recipe import parse_recipe
from tests.support.common import PROMPTS, build_model, pad_prompts


def test_each_row_has_a_recipe_and_comes_after_those_it_needs(tmp_path: Path) -> None:
    experiment = ProjectedStates(tmp_path, tmp_path, tmp_path)
    names = [name for name, _, _ in experiment.jobs()]
    assert len(names) == len(set(names))
    for name, row in experiment.settings["rows"][TASK].items():
        assert parse_recipe(experiment.recipe(TASK, name))[1].bf16
        for other in (row.get("cut"), row.get("behind"), row.get("outputs_of")):
            assert other is None or names.index(f"{TASK}/{other}") < names.index(f"{TASK}/{name}")
    assert len(experiment.settings["rows"][TASK]) == 3 + 2 * len(VARIANTS)
    assert LLM in experiment.settings["rows"][TASK]


def test_the_variants_of_the_start(tmp_path: Path) -> None:
    experiment = ProjectedStates(tmp_path, tmp_path, tmp_path)
    model, batch = build_model("add_shared"), pad_prompts(PROMPTS)
    torch.nn.init.zeros_(model.encoder.projector.linear_2.weight)
    experiment.change_start({"sampled": True}, model)
    assert model.encoder.projector.linear_2.weight.any()
    states, folded = model.encode_llm(**batch), copy.deepcopy(model.encoder.projector)
    fold(folded)
    assert not folded.mean.any()
    torch.testing.assert_close(folded(states), model.encoder.projector(states), rtol=1e-4, atol=1e-5)
