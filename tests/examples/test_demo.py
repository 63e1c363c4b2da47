"""The corpus of the demonstration, the LLM it ships, and (slow) the whole of it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo import corpus


ROOT = Path(__file__).parents[1]
CORPUS = "4959e76d00494145d5d6f3ae647dda5ce38e5e053972f76c79cf4b8c6212181d"  # SHA-256
LLM = ROOT / "demo" / "llm"


@pytest.fixture(scope="module")
def splits():
    return corpus.splits(2000)


def test_the_same_seed_gives_the_same_corpus(splits):
    assert corpus.splits(2000) == splits
    assert corpus.pairs(50, seed=1) != corpus.pairs(50)


def test_a_smaller_training_split_is_the_beginning_of_a_larger_one(splits):
    smaller = corpus.splits(500)
    assert smaller["train"] == splits["train"][:500]
    assert smaller["test"] == splits["test"]


def test_no_sentence_is_in_two_splits(splits):
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 2000 + sum(corpus.HELD_OUT.values())


def test_the_corpus_is_the_one_that_the_shipped_llm_knows(splits):
    # Whoever changes the grammar or its words trains the LLM anew: what it has seen could be in the test split.
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    assert digest == CORPUS


def test_sentences_are_sentences(splits):
    for row in splits["validation"]:
        for text in row.values():
            assert text[0].isupper()
            assert text[-1] in ".?"
            assert "  " not in text
            assert " ," not in text
            assert ",," not in text


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("eats", {"isst", "frisst"}),  # by who eats
        ("rides", {"reitet", "fährt"}),  # by what is ridden
        ("put", {"stellte", "legte"}),  # by how the thing will be
    ],
)
def test_the_context_decides_what_a_word_means(splits, english, german):
    words = {
        word.strip(".,?")
        for row in splits["train"]
        if english in row["prompt"].split()
        for word in row["target"].split()
    }
    assert german <= words


def test_the_shipped_llm_is_small():
    assert sum(file.stat().st_size for file in LLM.rglob("*") if file.is_file()) <= 5_000_000


def test_the_shipped_llm_translates(splits):
    from modeling_llm2slm.evaluation.metrics import score
    from modeling_llm2slm.inference.text_to_text import TextToText

    llm = TextToText.from_pretrained(LLM)
    assert llm.model.config.num_decoder_layers == llm.model.config.num_layers
    rows = splits["test"][:100]
    answers = llm.generate([row["prompt"] for row in rows], batch_size=100)
    assert 60 <= score(answers, [row["target"] for row in rows], ["bleu"])["bleu"] <= 95


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demonstration(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "demo", "--output", str(tmp_path / "demo"), "--results", str(results)]
    first = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    llm, slm, llm2slm = (json.loads(results.read_text())["rows"][name] for name in ("LLM", "SLM alone", "LLM-to-SLM"))
    assert 60 <= llm["bleu"] <= 95
    assert slm["bleu"] <= llm["bleu"] - 5
    assert llm2slm["bleu"] >= 0.98 * llm["bleu"]
    assert llm2slm["ms_per_output"] <= llm["ms_per_output"] / 2
    again = subprocess.run([*command[:5], "The dog eats a cake."], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Der Hund frisst einen Kuchen." in again.stdout
