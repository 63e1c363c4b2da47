"""The generator of the demo's corpus."""

import gzip
import hashlib
import json

import pytest

from examples.demo import DATA
from examples.demo.generator import corpus
from examples.demo.generator.__main__ import write_corpus
from modeling_llm2slm.data.loading import load_examples


CORPUS = "1f452f79e970b322a91745626d5813f88d26754eb847e1e5d6cf0197f34a1f55"  # SHA-256


@pytest.fixture(scope="module")
def splits():
    return corpus.splits(2000)


@pytest.fixture(scope="module")
def committed():
    return {name: load_examples(file) for name, file in DATA.items()}


def test_the_same_seed_gives_the_same_corpus(splits):
    assert corpus.splits(2000) == splits
    assert corpus.sample_examples(50, seed=1) != corpus.sample_examples(50)


def test_a_larger_training_split_starts_with_a_smaller_one(splits):
    smaller = corpus.splits(500)
    assert smaller["train"] == splits["train"][:500]
    assert smaller["test"] == splits["test"]


def test_the_grammar_is_the_one_that_the_shipped_llm_was_trained_with(splits):
    # If the grammar or its words change, train the LLM again: it may have seen sentences of the new test split.
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    assert digest == CORPUS


@pytest.mark.slow
def test_the_generator_writes_the_committed_data_byte_for_byte(tmp_path):
    for name, file in write_corpus(tmp_path).items():
        # Compression depends on the version of zlib, so the content is compared.
        with gzip.open(file) as generated, gzip.open(DATA[name]) as shipped:
            assert generated.read() == shipped.read(), name


def test_no_sentence_is_in_two_splits(committed):
    prompts = [prompt for examples in committed.values() for prompt in examples["prompt"]]
    assert len(prompts) == len(set(prompts)) == 16_000 + sum(corpus.HELD_OUT.values())


def test_sentences_are_capitalized_and_punctuated(committed):
    for example in committed["validation"]:
        for text in (example["prompt"], example["target"]):
            assert text[0].isupper()
            assert text[-1] in ".?"
            assert "  " not in text
            assert " ," not in text
            assert ",," not in text


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("eats", {"isst", "frisst"}),  # depends on who eats
        ("rides", {"reitet", "fährt"}),  # depends on what is ridden
        ("put", {"stellte", "legte"}),  # depends on how the thing will stand
    ],
)
def test_the_context_decides_the_meaning_of_a_word(splits, english, german):
    words = {
        word.strip(".,?")
        for example in splits["train"]
        if english in example["prompt"].split()
        for word in example["target"].split()
    }
    assert german <= words
