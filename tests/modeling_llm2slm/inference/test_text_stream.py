"""Text decoded token by token equals text decoded at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from modeling_llm2slm.inference.text_stream import TextStream
from tests.support.serving import byte_tokenizer


DATA = Path(os.environ.get("LLM2SLM_DATA", ""))
TEXTS = st.lists(
    st.sampled_from(["Größe ", "😀", "𝄞", " ,", "a", "b ", " .", " n't", "漢字", "\n", "  ", "é", "\ufffd", "<pad>"])
    | st.text(max_size=4)
).map("".join)


def load_tokenizer(name: str) -> Any:
    if name == "byt5":  # decodes in Python
        return ByT5Tokenizer()
    if not (DATA / f"tokenizer_{name}").is_dir():
        pytest.skip("needs the tokenizers of LLM2SLM_DATA")
    return AutoTokenizer.from_pretrained(DATA / f"tokenizer_{name}")


@pytest.fixture(scope="module", params=["gpt2", "t5", "byt5"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(request.param)


def pieces_of(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Return the pieces of an output; the last one is sent when it is finished."""
    stream, pieces = TextStream(tokenizer, stop), []
    for count in range(1, len(ids)):
        stream.add(ids[:count])
        if stream.stopped:
            ids = ids[:count]
            break
        pieces.append(stream.take())
    stream.finish(ids)
    return [*pieces, stream.take(finished=True)]


class TestTextStream:
    @settings(max_examples=60, deadline=None)
    @given(text=TEXTS)
    def test_pieces_of_a_text_join_to_its_decoding(self, tokenizer: Any, text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_pieces_of_random_tokens_join_to_their_decoding(self, tokenizer: Any, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    @settings(max_examples=60, deadline=None)
    @given(
        text=TEXTS,
        stop=st.lists(st.sampled_from(["a", "b ", " n", "漢字", "\n", "😀𝄞", "öß"]), min_size=1, max_size=3),
    )
    def test_pieces_join_to_the_text_before_the_first_stop_text(
        self, tokenizer: Any, text: str, stop: list[str]
    ) -> None:
        ids = tokenizer(text)["input_ids"]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        cut = min((whole.split(each)[0] for each in stop), key=len)
        assert "".join(pieces_of(tokenizer, ids, tuple(stop))) == cut

    def test_piece_is_available_as_soon_as_its_character_is_whole(self) -> None:
        tokenizer = byte_tokenizer()
        pieces = pieces_of(tokenizer, tokenizer("nö 😀 ja")["input_ids"])
        assert pieces == ["n", "", "ö", " ", "", "", "", "😀", " ", "j", "a"]

    def test_text_that_may_begin_a_stop_text_is_held_back(self) -> None:
        tokenizer = byte_tokenizer()
        pieces = pieces_of(tokenizer, tokenizer("bis weit")["input_ids"], ("isweit", "ir"))
        assert pieces == ["b", "", "", "is ", "w", "e", "", "it"]
