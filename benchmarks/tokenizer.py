"""Train the T5 tokenizer of an experiment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from transformers import T5Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6000) -> T5Tokenizer:
    """
    Train a T5 tokenizer (Unigram; pad 0, end 1, unknown 2, no sentinel tokens) on texts.

    Letters, digits and punctuation never share a token, and nothing is normalized: decoding restores a text whose
    characters all occur in `texts`, except that each run of white space becomes one space.

    Args:
        texts: The training split, in all its languages.
        vocab_size: Number of tokens, including the three special ones.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    # T5 splits at white space only, but a vocabulary that is trained on finer pieces has no tokens across them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return T5Tokenizer(vocab=_unigram_scores(tokenizer), extra_ids=0)


def _unigram_scores(tokenizer: Any) -> list[tuple[str, float]]:
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(token, score) for token, score in vocabulary]
