"""The sweep of prompt lengths: its cells, and what it yields for each."""

from __future__ import annotations

import pytest

from benchmarks.prompt_lengths import CELLS, measure, parse_cell
from tests.support import families
from tests.support.common import compose


def test_every_cell_is_timed_against_the_llm(capsys: pytest.CaptureFixture[str]) -> None:
    llm = families.build_whole("gemma3")
    models = {"llm": llm, "llm2slm": compose(llm, families.build_slm("gemma3"), "cache").model.eval()}
    cells = [(5, 3, 2), (6, 2, 1)]
    found = list(measure(models, cells, rounds=2))
    assert [(one["prompt_tokens"], one["new_tokens"], one["batch"]) for one in found] == cells
    assert all(one["ratio"] > 0 and set(one["seconds"]) == set(models) for one in found)
    assert capsys.readouterr().out.count("of the LLM's time") == 2


def test_a_cell_names_prompt_output_and_batch() -> None:
    assert parse_cell("64/32x8") == (64, 32, 8)
    assert len(set(map(parse_cell, CELLS))) == len(CELLS)
