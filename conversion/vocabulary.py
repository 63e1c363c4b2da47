"""Parts of a vocabulary: the tokens that texts need, and a tokenizer with those tokens alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


SPACE = "▁"  # SentencePiece writes a space so, and decodes no space from the bytes of this character
# Added tokens that stand for nothing: <unused0> (Gemma), <|reserved_special_token_0|> (Llama).
PLACEHOLDER = re.compile("unused|reserved", re.IGNORECASE)


def read_backend(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> dict[str, Any]:
    """
    Return the content of a tokenizer's `tokenizer.json`.

    Raises:
        ValueError: If its vocabulary cannot be pruned without losing texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = content["model"]["type"] if content else type(tokenizer).__name__
    if kind not in ("BPE", "Unigram"):
        raise ValueError(
            f"The tokenizer of {source} is a {kind} tokenizer, which loses words without a token of their own: "
            "take a model with a BPE or Unigram tokenizer."
        )
    return content


def needed_tokens(content: Mapping[str, Any], used: Iterable[int]) -> set[int]:
    """
    Return the ids of the tokens that encode the same texts to the same tokens, and any other text without loss.

    Args:
        content: The `tokenizer.json` of the whole tokenizer.
        used: The ids of the tokens to keep, to which these are added: the pieces that the tokenizer makes them of,
            all bytes or (in a tokenizer that knows no bytes) all single characters, and all added tokens but
            placeholders.
    """
    used = set(used)
    is_bpe = content["model"]["type"] == "BPE"
    needed = _needed_for_bpe(content, used) if is_bpe else _needed_for_unigram(content)
    added = {token["id"] for token in content["added_tokens"] if not PLACEHOLDER.search(token["content"])}
    return used | needed | added


def _needed_for_bpe(content: Mapping[str, Any], used: set[int]) -> set[int]:
    model = content["model"]
    vocabulary: dict[str, int] = model["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    base = {model["unk_token"]}
    base |= _bytes_of(content, vocabulary) or {
        token for token in vocabulary if len(token.removeprefix(prefix).removesuffix(suffix)) == 1
    }
    for token in [token for token, number in vocabulary.items() if number in used]:
        base |= _derive(token, ranks, prefix, suffix)
    return {vocabulary[token] for token in base & vocabulary.keys()}


def _derive(token: str, ranks: Mapping[tuple[str, ...], int], prefix: str, suffix: str) -> set[str]:
    """Return all tokens that BPE makes on its way from the characters of a token to the token."""
    inside, end = token.removeprefix(prefix), ""
    is_first = inside == token  # of a word
    if suffix and inside.endswith(suffix) and inside != suffix:
        inside, end = inside.removesuffix(suffix), suffix
    symbols = [letter if place == 0 and is_first else prefix + letter for place, letter in enumerate(inside)]
    symbols[-1] += end
    seen = {token, *symbols}
    while len(symbols) > 1:
        # Merges never cross the ends of a token, so a token is made in the same way alone and within a text.
        pairs = list(zip(symbols, symbols[1:], strict=False))
        place = min(range(len(pairs)), key=lambda place: ranks.get(pairs[place], inf))
        if pairs[place] not in ranks:
            break
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1].removeprefix(prefix)]
        seen.add(symbols[place])
    return seen


def _needed_for_unigram(content: Mapping[str, Any]) -> set[int]:
    pieces: list[tuple[str, float]] = content["model"]["vocab"]
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    # The score of an unknown character depends on the lowest one.
    needed = {min(range(len(pieces)), key=lambda number: pieces[number][1]), content["model"]["unk_id"]} - {None}
    in_bytes = _bytes_of(content, vocabulary)
    if in_bytes:
        return needed | {vocabulary[token] for token in in_bytes}
    single = {piece for piece in vocabulary if len(piece) == 1}
    return needed | {number for piece, number in vocabulary.items() if piece in single or not single.issuperset(piece)}


def _bytes_of(content: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[str]:
    """Return the tokens of single bytes, with that of a space, if the tokenizer writes unknown characters in bytes."""
    in_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    is_used = content["model"].get("byte_fallback") and "ByteFallback" in json.dumps(content["decoder"])
    return (in_bytes | {SPACE}) & vocabulary.keys() if is_used and vocabulary.keys() >= in_bytes else set()


def prune_backend(content: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """
    Return the `tokenizer.json` of the tokens that are kept.

    Args:
        content: The `tokenizer.json` of the whole tokenizer.
        ids: The new id of each token that is kept, in the order of the old ones.
    """
    model = dict(content["model"])
    if model["type"] == "BPE":
        kept = {token: ids[number] for token, number in model["vocab"].items() if number in ids}
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in kept and right in kept and left + right.removeprefix(prefix) in kept
        ]
        model["vocab"] = kept
    else:
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in ids]
        model["unk_id"] = ids.get(model["unk_id"])
    padding = content["padding"]
    return {
        **content,
        "model": model,
        "added_tokens": [{**token, "id": ids[token["id"]]} for token in content["added_tokens"] if token["id"] in ids],
        "padding": padding and {**padding, "pad_id": ids[padding["pad_id"]]},
        "post_processor": _renumber(content["post_processor"], ids),
    }


def _renumber(value: Any, ids: Mapping[int, int]) -> Any:
    """Return a post-processor with new ids: lists named `ids` in a template, pairs of token and id in BERT's."""
    if isinstance(value, dict):
        return {
            name: [ids[i] for i in item] if name == "ids" else _renumber(item, ids) for name, item in value.items()
        }
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return [value[0], ids[value[1]]]
        return [_renumber(item, ids) for item in value]
    return value
