"""A few of the trials of `benchmarks.adversary`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_lost_hangs_or_ends_in_a_traceback(tmp_path: Path) -> None:
    words = ["--kills", "3", "--disks", "10", "--read-only", "10", "--data", "100", "--checkpoints", "20"]
    command = [sys.executable, "-m", "benchmarks.adversary", *words, "--output", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (tmp_path / "result.json").exists(), done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["faults"] == []
    assert all(counts["equal afterwards"] == 3 for counts in result["kills"].values())
    assert result["two runs"] == {"runs": 5, "one refused": 5, "other unharmed": 5}
