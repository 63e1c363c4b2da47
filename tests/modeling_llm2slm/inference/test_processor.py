"""The processor takes the arguments of tokenizers and chat templates, and says what is wrong with a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modeling_llm2slm import LLM2SLMProcessor
from tests.support.common import llm_tokenizer, slm_tokenizer, tiny_tokenizer


LONG = "src1 src2 src3 src4 src5 src6"
TARGET = "out1 out2 out3 out4 out5"
CHAT = [{"role": "user", "content": "src1 src2"}]
WORDS = ["user", "assistant", ":", "tool", "think", *(f"src{i}" for i in range(10))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if tools %}tool {% endif %}{% if enable_thinking %}think {% endif %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture
def processor() -> LLM2SLMProcessor:
    return LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())


def chat_processor(template: str | None = TEMPLATE) -> LLM2SLMProcessor:
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tiny_tokenizer(WORDS, special, end="</s>")
    tokenizer.chat_template = template
    return LLM2SLMProcessor(tokenizer, slm_tokenizer())


def test_limits_are_those_of_tokenizers(processor: LLM2SLMProcessor) -> None:
    kwargs: dict[str, Any] = {"text": [LONG, "src1"], "text_target": [TARGET, "out1"]}
    whole, end = processor(**kwargs), processor.eos_token_id
    for cut in (
        {"truncation": True, "max_length": 4},
        {"max_length": 4},
        {"truncation": "longest_first", "max_length": 4, "padding": False},
        {"text_kwargs": {"truncation": True, "max_length": 4}},
    ):
        batch = processor(**kwargs, **cut)
        assert batch["input_ids"] == processor.tokenizer(kwargs["text"], max_length=4, truncation=True).input_ids
        assert [len(row) for row in batch["labels"]] == [4, 2]
        assert all(row[-1] == end for row in batch["labels"])
    limited = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer(), prompt_max_length=3, target_max_length=3)
    assert len(limited(**kwargs)["input_ids"][0]) == len(limited(**kwargs)["labels"][0]) == 3
    assert dict(limited(**kwargs, truncation=False)) == dict(whole)
    assert len(limited(**kwargs, truncation=True, max_length=5)["input_ids"][0]) == 5
    assert len(limited(**kwargs, target_max_length=4)["labels"][0]) == 4
    padded = processor(**kwargs, padding="max_length", max_length=9, return_tensors="pt")
    assert {value.shape[1] for value in padded.values()} == {9}
    assert dict(processor(**kwargs, padding=True, max_length=2)) == dict(processor(**kwargs, padding=True))
    processor.tokenizer.model_max_length = 5
    assert len(processor(text=LONG, truncation=True)["input_ids"]) == 5
    for wrong in (0, -1, "long", 2.5, True):
        with pytest.raises(ValueError, match="`max_length` is .*must be None or an int of at least 1"):
            processor(text=LONG, max_length=wrong)
    with pytest.raises(ValueError, match="`target_max_length` is 1"):
        processor(text_target=TARGET, target_max_length=1)


def test_other_arguments_of_tokenizers(processor: LLM2SLMProcessor) -> None:
    llms, end = processor.tokenizer, processor.eos_token_id
    bare = processor(text=LONG, text_target=TARGET, add_special_tokens=False)
    assert bare["input_ids"] == llms(LONG, add_special_tokens=False).input_ids
    assert bare["labels"][-1] == end
    assert end not in processor(text_target=TARGET, add_special_tokens=False)["labels"]
    assert sorted(processor(text=LONG, return_attention_mask=False)) == ["input_ids"]
    assert "attention_mask" in processor(text=LONG, return_attention_mask=True)
    batch = processor(text=[LONG, "src1"], padding=True, padding_side="left", return_tensors="np")
    assert isinstance(batch["input_ids"], np.ndarray)
    assert batch["attention_mask"][1].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert llms.padding_side == "right"
    assert processor(text=LONG, return_length=True, verbose=False, images=None)["length"] is not None
    assert "special_tokens_mask" in processor(text=[LONG, "src1"], return_special_tokens_mask=True, padding=True)
    with pytest.raises(TypeError, match="takes max_lenght, videos"):
        processor(text=LONG, max_lenght=3, videos=[1])
    assert "input_ids" in processor(text=LONG, is_split_into_words=False)
    for name, fix in (("is_split_into_words", "Join the words"), ("return_overflowing_tokens", "Split long prompts")):
        with pytest.raises(ValueError, match=f"`{name}` is not supported: .*{fix}"):
            processor(text=LONG, **{name: True})
    with pytest.raises(ValueError, match="longest is not a valid TruncationStrategy"):
        processor(text=LONG, truncation="longest", max_length=3)


@pytest.mark.parametrize(
    "template", [TEMPLATE, "{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ 'src1' }}</s> src2"]
)
def test_special_tokens_are_there_once(template: str) -> None:
    """A chat has the same ids whether the processor or the caller applies the template, alone or among others."""
    processor = chat_processor(template)
    rendered = processor.apply_chat_template(CHAT)
    expected = processor(text=CHAT)["input_ids"]
    tokens = processor.tokenizer.convert_ids_to_tokens(expected)
    assert all(tokens.count(token) <= 1 for token in ("<s>", "</s>"))
    assert processor(text=rendered)["input_ids"] == expected
    assert processor(text=rendered, add_special_tokens=True)["input_ids"] == expected
    assert processor(text=["src3", rendered])["input_ids"] == [processor(text="src3")["input_ids"], expected]
    assert processor.apply_chat_template(CHAT, tokenize=True)["input_ids"] == expected
    assert processor(text="src3")["input_ids"][-1] == processor.tokenizer.eos_token_id


def test_arguments_of_templates_and_of_tokenizers() -> None:
    processor = chat_processor()
    assert processor.apply_chat_template(CHAT, tools=[{"type": "function"}], enable_thinking=True).split()[-4:] == [
        *("tool", "think", "assistant", ":")
    ]
    assert processor.apply_chat_template(CHAT, TEMPLATE + "{{ unused }}") == processor.apply_chat_template(CHAT)
    assert processor.apply_chat_template(CHAT, chat_template="src9") == "src9"
    continued = processor.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "src3"}], continue_final_message=True
    )
    assert continued.endswith("assistant : src3")
    plain = processor.apply_chat_template(CHAT, tokenize=True)
    for kwargs in (
        {"return_dict": True},
        {"enable_thinking": False},
        {"tools": []},
        {"documents": [{"title": "a", "text": "b"}]},
        {"return_tensors": "auto"},
        {"processor_kwargs": {"return_attention_mask": True}},
        {"tokenizer_kwargs": {"padding": True}},
    ):
        assert dict(processor.apply_chat_template(CHAT, tokenize=True, **kwargs)) == dict(plain)
    ids = processor.apply_chat_template(CHAT, tokenize=True, return_dict=False, return_tensors="pt")
    assert torch.equal(ids, torch.tensor([plain["input_ids"]]))
    batch = processor.apply_chat_template(
        [CHAT, CHAT * 2], tokenize=True, padding=True, truncation=True, max_length=9, return_tensors="pt"
    )
    assert batch["input_ids"].shape == (2, 9)
    labelled = processor.apply_chat_template(CHAT, tokenize=True, text_target="out1")
    assert labelled["labels"][0] == processor.decoder_tokenizer.convert_tokens_to_ids("out1")


def test_a_named_template_of_the_processor() -> None:
    processor = chat_processor(None)
    processor.chat_template = {"default": "src1", "other": "src2"}
    assert processor.apply_chat_template(CHAT) == "src1"
    assert processor.apply_chat_template(CHAT, "other") == "src2"
    assert processor.apply_chat_template(CHAT, chat_template="src3") == "src3"


@pytest.mark.parametrize(
    "wrong", ["src1", ["src1"], CHAT[0], {"messages": CHAT}, [CHAT, "src1"], [[]], None, 3], ids=repr
)
def test_what_is_no_conversation_is_one_sentence(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`conversation` holds .*, but it takes lists of messages, such as"):
        chat_processor().apply_chat_template(wrong)


@pytest.mark.parametrize("name", ["return_assistant_tokens_mask", "sanitize_control_tokens"])
def test_arguments_that_the_tokenizer_alone_supports(name: str) -> None:
    processor = chat_processor()
    with pytest.raises(ValueError, match=f"`{name}` is not supported .*`processor.tokenizer.apply_chat_template"):
        processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, **{name: True})
    assert processor.apply_chat_template(CHAT, **{name: False}) == processor.apply_chat_template(tuple(CHAT))


HALF = "half \ud83d"


@pytest.mark.parametrize("name", ["text", "text_target"])
@pytest.mark.parametrize(
    "wrong", [None, float("nan"), b"src1", bytearray(b"a"), 3, ["src1"], {"role": "user"}, HALF, ("a", "b")], ids=repr
)
def test_what_is_no_text_is_one_sentence(name: str, wrong: Any, processor: LLM2SLMProcessor) -> None:
    values = [["src1", wrong]] if isinstance(wrong, dict) else [["src1", wrong], [wrong]]  # one dict is a conversation
    for value in values if wrong is None or isinstance(wrong, (list, tuple)) else [*values, wrong]:
        with pytest.raises(ValueError, match=f"^`{name}` holds .*") as caught:
            processor(**{name: value})
        assert "\n" not in str(caught.value)


def test_lone_surrogates_in_a_conversation() -> None:
    with pytest.raises(ValueError, match="half of a character"):
        chat_processor()(text=[{"role": "user", "content": HALF}])
    with pytest.raises(ValueError, match="half of a character"):
        chat_processor().apply_chat_template([{"role": "user", "content": HALF}])


def test_collections_of_texts(processor: LLM2SLMProcessor) -> None:
    expected = dict(processor(text=["src1", "src2"], text_target=["out1", "out2"]))
    for kind in (tuple, np.array, iter):
        assert dict(processor(text=kind(["src1", "src2"]), text_target=kind(["out1", "out2"]))) == expected


def test_padding_rows(processor: LLM2SLMProcessor) -> None:
    rows = [dict(processor(text=p, text_target=t)) for p, t in ((LONG, TARGET), ("src1", "out1"))]
    expected = processor(text=[LONG, "src1"], text_target=[TARGET, "out1"], padding=True, return_tensors="pt")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    tensors = [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]
    for features in (rows, columns, tensors):
        batch = processor.pad(features, return_tensors="pt")
        assert {name: value.tolist() for name, value in batch.items()} == {k: v.tolist() for k, v in expected.items()}
    assert processor.pad(rows, padding_side="left")["attention_mask"][1][0] == 0
    assert processor.pad(rows, padding_side="left")["labels"] == expected["labels"].tolist()
    assert len(processor.pad(rows, padding="max_length", max_length=12)["labels"][0]) == 12
    assert len(processor.pad(rows, pad_to_multiple_of=8)["labels"][1]) == 8
    assert processor.pad([{"labels": row["labels"]} for row in rows])["labels"] == expected["labels"].tolist()
    assert dict(processor.pad(rows[0])) == rows[0]
    assert "labels" not in processor.pad([{**row, "labels": None} for row in rows])
