"""The tokenizer that the Multi30k experiment trains."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from benchmarks.tokenizer import train_tokenizer


TEXTS = ["Der Hund läuft über die Straße.", "The dog runs, the dog sleeps.", "Zwei Hunde (3 und 14) laufen!"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=80)


def test_the_tokenizer_restores_texts_and_loads_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], "Straße über Hund (41)!"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert reloaded(text)["input_ids"] == ids


def test_special_tokens_have_the_ids_of_t5(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 80


def test_punctuation_and_digits_are_separate_tokens(tokenizer):
    assert tokenizer.tokenize("runs, 14")[-4:] != ["▁runs,", "▁14"]
    for token in tokenizer.get_vocab():
        letters = any(letter.isalpha() for letter in token)
        assert not letters or not set(token) & set(".,()!0123456789"), token
