"""The scripts of the two tutorials, and the container."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_model_learns_its_examples_and_is_the_same_when_loaded(tmp_path):
    printed = run("examples/first_model.py", str(tmp_path))
    outputs, targets = (re.findall(rf"^{label}  (.*)$", printed, re.MULTILINE) for label in ("output", "target"))
    assert len(outputs) == 3
    assert outputs == targets
    assert "The loaded model generates the same text: True" in printed
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sped_up_model_is_faster_than_its_llm_and_agrees_with_it(tmp_path):
    printed = run("examples/speed_up.py", str(tmp_path))
    for stage in ("distill", "build", "encode", "train", "evaluate"):
        assert f"{stage}: llm2slm {stage} " in printed
    agreement = float(re.search(r"Agreement with the LLM's outputs: ([\d.]+) BLEU", printed)[1])
    times_faster = float(re.search(r"\(([\d.]+) times faster\)", printed)[1])
    assert agreement >= 60
    assert times_faster >= 1.5
    assert (tmp_path / "model" / "config.json").is_file()


def test_the_container_copies_what_exists():
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "examples" / "Dockerfile").read_text(), re.MULTILINE)
    names = " ".join(copied).split()
    assert {"modeling_llm2slm", "llm2slm", "conversion", "configuration", "setup.cfg"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists()] == []
