"""Sweeps: lists of cells in YAML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modeling_llm2slm.benchmark.cells import load_sweep
from modeling_llm2slm.benchmark.contestants import contestants
from modeling_llm2slm.conversion.build import preset_config


CONFIGURATION = Path(__file__).parents[3] / "configuration"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: 3", "not a sweep"),
        ("rows: []", "not a sweep"),
        ("cells: [{prompt: 3, reply: 4}]", "reply"),
        ("cells: []", "not a sweep: it must have `cells`, a list of mappings such as"),
        ("- {prompt: 3}", "not a sweep: it must have `cells`"),
        ("{cells: [{prompt: 3}], cels: 4}", "and nothing else"),
        ("cells: [3]", "cell 1 is 3, but it must map names to values"),
        ("cells: [{prompt: 3}, [prompt]]", "cell 2 is"),
        ("cells: [{promp: 3}]", "cell 1: A cell has no field 'promp'. Did you mean prompt?"),
        ("cells: [{1: 3}]", "cell 1: A cell has no field 1."),
        ("cells: [{prompt: -1}]", "cell 1: prompt is -1, but it must be at least 1"),
        ("cells: [{prompt: .nan}]", "cell 1: prompt is nan, but it must be a whole number"),
        ("cells: [{batch: 99999999999}]", "cell 1: batch is 99999999999, but it must be at most"),
        ("cells: [{repeats: 99999999999}]", "cell 1: repeats is 99999999999, but it must be at most"),
        ("cells: [{beams: true}]", "cell 1: beams is True, but it must be a whole number"),
        ("cells: [{contestants: llm}]", "cell 1: contestants is 'llm', but it must be a list"),
        ("cells: [{contestants: 5}]", "cell 1: contestants is 5, but it must be a list"),
        ("cells: [" + "{prompt: 3}, " * 41 + "]", "41 cells"),
    ],
)
def test_a_file_that_is_not_a_sweep_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("name", ["benchmark.yaml", "benchmark_engines.yaml"])
def test_sweeps_of_the_package_name_existing_presets_and_contestants(name: str) -> None:
    cells = load_sweep(CONFIGURATION / name)
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(set(cell.contestants) <= contestants().keys() for cell in cells)
    assert all(preset_config(cell.preset) for cell in cells)
