"""Shorter prompts for the SLM: which tokens a group has, padding, and the recipes and timing of the experiment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.prompt_stride import FUSIONS, PAIR, ROWS, Strides, run_time
from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.conversion.build import preset_config
from modeling_llm2slm.training.recipe import parse_recipe
from tests.support.common import PROMPTS, pad_prompts


@pytest.mark.parametrize("fusion", FUSIONS)
def test_groups_end_with_the_last_token_and_padding_changes_none(fusion: str) -> None:
    torch.manual_seed(0)
    config, stride = preset_config("tiny"), FUSIONS[fusion][1]
    config.fusion = fusion
    model = LLM2SLMForConditionalGeneration(config).eval()
    padded = model.encode_prompt(**pad_prompts(PROMPTS, extra=3))
    for row, prompt in enumerate(PROMPTS):
        alone = pad_prompts([prompt])
        states = model.encode_prompt(**alone).last_hidden_state[0]
        assert len(states) == padded.attention_mask[row].sum() == -(-len(prompt) // stride)
        torch.testing.assert_close(padded.last_hidden_state[row, -len(states) :], states, rtol=1e-4, atol=1e-5)
        changed = model.encode_llm(**alone)
        changed[:, -stride:] += 1
        groups = model.encode_prompt(**alone, llm_hidden_states=changed).last_hidden_state[0]
        assert torch.equal(groups[:-1], states[:-1])
        assert not torch.isclose(groups[-1], states[-1]).all()


def test_each_row_has_a_recipe(tmp_path: Path) -> None:
    experiment = Strides(tmp_path, tmp_path)
    rows = [job for job in experiment.jobs if job.row is not None]
    assert [job.name for job in rows] == ["llm", *ROWS]
    for job in rows:
        recipe, _ = parse_recipe(experiment.recipe(job))
        assert bool(recipe.llm_states) == (job.name != "llm")
        assert job.name not in job.needs
    assert {job.pair for job in rows} == {PAIR}


def test_the_timing_has_every_stride() -> None:
    result = run_time(Cell(16, 2, batch=2, repeats=1), ["tiny"])
    assert list(result["speedups"]) == ["llm", "tiny stride 1", "tiny stride 2", "tiny stride 4"]
    assert result["speedups"]["llm"] == 1
