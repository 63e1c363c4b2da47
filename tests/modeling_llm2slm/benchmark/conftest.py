"""One small benchmark on PyTorch, measured once for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.benchmark import benchmark
from modeling_llm2slm.benchmark.benchmark import Benchmark
from modeling_llm2slm.benchmark.cells import Cell
from tests.support.quick_start import start_quickly


STOCK = ("llm", "slm", "llm2slm")
CELLS = [
    Cell(prompt=6, output=output, batch=batch, beams=beams, preset="tiny", contestants=STOCK, repeats=2)
    for output, batch, beams in ((5, 1, 1), (5, 2, 2), (9, 1, 1))
]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as monkeypatch:
        start_quickly(monkeypatch, benchmark)
        return folder, Benchmark(CELLS, folder / "benchmark.json", folder).run()
