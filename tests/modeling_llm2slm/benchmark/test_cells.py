"""Sweeps: lists of cells in YAML."""

from __future__ import annotations

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
        ("cells: [" + "{prompt: 3}, " * 41 + "]", "41 cells"),
    ],
)
def test_a_file_that_is_not_a_sweep_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("name", ["benchmark.yaml", "benchmark_engines.yaml"])
def test_sweeps_of_the_package_name_existing_presets_and_contestants(name: str) -> None:
    cells = load_sweep(CONFIGURATION / name)
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(set(cell.contestants) <= contestants().keys() for cell in cells)
    assert all(preset_config(cell.preset) for cell in cells)
