"""The LLM that the demo ships, and the whole demo (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo import DATA, LLM
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.settings import DataSettings


ROOT = Path(__file__).parents[3]
NOISE = ("Loading weights", "Generating train split", "Map:", "Writing model shards", "Warning", "[transformers]")


def test_the_shipped_files_are_small():
    assert sum(file.stat().st_size for file in LLM.rglob("*") if file.is_file()) <= 5_000_000
    assert sum(Path(file).stat().st_size for file in DATA.values()) <= 1_000_000


def test_the_shipped_llm_translates():
    from modeling_llm2slm.evaluation.metrics import score
    from modeling_llm2slm.inference.text_to_text import TextToText

    llm = TextToText.from_pretrained(LLM)
    assert llm.model.config.num_decoder_layers == llm.model.config.num_layers
    examples = load_examples(DATA["test"], DataSettings(limit=100))
    outputs = llm.generate(examples["prompt"][:], batch_size=100)
    assert 60 <= score(outputs, examples["target"][:], ["bleu"])["bleu"] <= 95


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_trains_compares_and_translates(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "examples.demo", "--output", str(tmp_path / "demo"), "--results", str(results)]
    first = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert not [noise for noise in NOISE if noise in first.stdout + first.stderr]
    llm, slm, llm2slm = (json.loads(results.read_text())["rows"][name] for name in ("LLM", "SLM alone", "LLM-to-SLM"))
    assert 60 <= llm["bleu"] <= 95
    assert slm["bleu"] <= llm["bleu"] - 5
    assert llm2slm["bleu"] >= 0.98 * llm["bleu"]
    assert llm2slm["ms_per_output"] <= llm["ms_per_output"] / 2
    again = subprocess.run([*command[:5], "The dog eats a cake."], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Der Hund frisst einen Kuchen." in again.stdout
