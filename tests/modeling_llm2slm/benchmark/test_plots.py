"""Plots of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.benchmark.plots import plot

from .conftest import STOCK


def test_a_plot_needs_cells_that_differ_only_in_its_axis(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    files = plot(measured[1], tmp_path)
    assert [file.name for file in files] == ["time.svg"]  # only the output length varies alone
    text = files[0].read_text()
    assert all(name in text for name in STOCK)
