"""Other load on the machine."""

from __future__ import annotations

import pytest

from modeling_llm2slm.benchmark import machine


def test_other_load_marks_a_cell_as_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 109.0])
    times = type("Times", (), {"system": 0.0, "nice": 0.0})
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: type("Now", (times,), {"user": next(ticks)})())
    with machine.disturbance() as found:
        pass
    assert found["noisy"]
    assert found["others_busy"] > 1
