"""Conversations in data, in every format and for every reader, give the prompts and targets that texts give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from modeling_llm2slm.data import loading
from modeling_llm2slm.data.conversations import as_prompt, conversation_in, encode_prompts
from modeling_llm2slm.data.loading import load_examples, load_prompts, load_rows, whole_row
from modeling_llm2slm.data.streaming import StreamedFeatures, StreamSettings
from modeling_llm2slm.settings import DataSettings


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM, QUESTION, REPLY = message("system", "Be brief."), message("user", "Hi \u2028 ü"), message("assistant", "Hallo")
PROMPT = [SYSTEM, QUESTION]
FORMATS = {
    "messages": {"messages": [*PROMPT, REPLY]},
    "messages and a title": {"messages": [*PROMPT, REPLY], "prompt": "Hi"},
    "prompt and completion": {"prompt": PROMPT, "completion": [REPLY]},
    "prompt and target": {"prompt": PROMPT, "target": "Hallo"},
    "prompt and messages as target": {"prompt": PROMPT, "target": [REPLY]},
    "texts of TRL": {"prompt": as_prompt(PROMPT), "completion": "Hallo"},
}


def write(rows: list[dict[str, Any]], path: Path) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def features(prompts: list[str], targets: list[str]) -> dict[str, list[Any]]:
    return {"input_ids": [conversation_in(prompt) for prompt in prompts], "labels": list(targets)}


def streamed(source: str, **options: Any) -> list[dict[str, Any]]:
    settings = StreamSettings(batch_size=1, buffer=1, **options)
    stream = StreamedFeatures(source, features, lambda found: [None] * len(found["labels"]), settings)
    return [row for row, _ in zip(stream, range(2), strict=False)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("layout", FORMATS)
def test_every_format_gives_prompt_and_target(layout: str, suffix: str, tmp_path: Path) -> None:
    source = write([FORMATS[layout]] * 2, tmp_path / f"rows{suffix}")
    examples = load_examples(source, number_rows=True)
    assert examples.column_names == ["prompt", "target", "row"]
    for example in examples:
        assert conversation_in(example["prompt"]) == PROMPT
        assert example["target"] == "Hallo"
    assert streamed(source) == [{"input_ids": PROMPT, "labels": "Hallo"}] * 2
    if layout != "messages and a title":  # whose title is a prompt where no target is needed
        assert [conversation_in(prompt) for prompt in load_prompts(source)["prompt"]] == [PROMPT] * 2
        assert conversation_in(load_rows(source)[0]["prompt"]) == PROMPT


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_whole_rows_keep_their_messages(suffix: str, tmp_path: Path) -> None:
    rows = load_rows(write([{**FORMATS["messages"], "id": 7}], tmp_path / f"rows{suffix}"))
    row = whole_row(rows[0])
    assert row["messages"] == [*PROMPT, REPLY]
    assert row["id"] == 7
    assert not any(isinstance(value, str) for value in row.values())


def test_a_data_set_of_the_hub_may_hold_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([FORMATS["messages"]])
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: rows)
    assert load_examples("user/data")["target"][:] == ["Hallo"]


def test_messages_may_be_stored_column_by_column(tmp_path: Path) -> None:
    messages = {key: [each[key] for each in [*PROMPT, REPLY]] for key in ("role", "content")}
    examples = load_examples(write([{"messages": messages}], tmp_path / "rows.parquet"))
    assert conversation_in(examples["prompt"][0]) == PROMPT
    assert examples["target"][:] == ["Hallo"]


def test_columns_of_other_names_hold_conversations(tmp_path: Path) -> None:
    rows = [{"chat": PROMPT, "best": [REPLY], "other": "Moin"}]
    source = write(rows, tmp_path / "rows.jsonl")
    examples = load_examples(source, DataSettings(prompt_column="chat"), ["best", "other"])
    assert examples["target"][:] == ["Hallo", "Moin"]
    # Outputs of the LLM replace the reply.
    distilled = write([{"messages": [*PROMPT, REPLY], "llm_output": "Moin"}], tmp_path / "distilled.jsonl")
    examples = load_examples(distilled, target_column=["target", "llm_output"])
    assert examples["target"][:] == ["Hallo", "Moin"]
    assert {str(conversation_in(prompt)) for prompt in examples["prompt"]} == {str(PROMPT)}


def test_a_prompt_may_end_with_the_user(tmp_path: Path) -> None:
    source = write([{"messages": PROMPT}], tmp_path / "rows.jsonl")
    assert conversation_in(load_prompts(source)["prompt"][0]) == PROMPT
    with pytest.raises(ValueError, match="the messages of row 0 cannot be used: its last message, the target"):
        load_examples(source)


BAD = {
    "no reply": (
        [QUESTION],
        "row 1 cannot be used: its last message, the target, must have the role 'assistant'",
    ),
    "only a reply": ([REPLY], "row 1 cannot be used: no message comes before that of the role 'assistant'"),
    "empty": ([], r"the messages of row 1 cannot be used: \[\] is not a list of messages"),
    "no list": ("Hi", "the messages of row 1 cannot be used: 'Hi' is not a list of messages"),
    "no messages": (["Hi"], "is not a list of messages"),
    "no content": ([{"role": "user"}, REPLY], "row 1 cannot be used: message 0 has the content None"),
    "content of parts": (
        [message("user", [{"type": "text"}]), REPLY],
        "row 1 cannot be used: message 0 has the content",
    ),
    "no role": ([{"content": "Hi"}, REPLY], "row 1 cannot be used: message 0 has the role None"),
    "half a character": ([message("user", "\ud83d"), REPLY], "row 1 cannot be used: message 0 has the content"),
    "null": (None, "None is not a list of messages"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_conversation_is_a_bad_row(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages, problem = BAD[kind]
    source = write([FORMATS["messages"], {"messages": messages}, FORMATS["messages"]], tmp_path / "rows.jsonl")
    for read in (load_examples, streamed):
        with pytest.raises(ValueError, match=problem) as caught:
            read(source)
        assert str(caught.value).count("\n") == 0
    kept = load_examples(source, DataSettings(skip_bad_rows=True), number_rows=True)
    assert kept["row"][:] == [0, 2]
    assert "1 bad row was skipped: 1" in caplog.text
    assert len(streamed(source, skip_bad_rows=True)) == 2


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_bad_conversation_of_a_table_is_a_bad_row(suffix: str, tmp_path: Path) -> None:
    rows = [FORMATS["messages"], {"messages": [QUESTION]}, {"messages": [message("user", None), REPLY]}]
    source = write(rows, tmp_path / f"rows{suffix}")
    with pytest.raises(ValueError, match=r"row 1 cannot be used: its last .* There are 2 bad rows: 1, 2\."):
        load_examples(source)
    assert len(load_examples(source, DataSettings(skip_bad_rows=True))) == 1


class Reader:
    chat_template: str | None = None


def test_texts_and_conversations_keep_their_order() -> None:
    reader, calls = Reader(), []
    reader.chat_template = "{{ messages }}"

    def encode(prompts: list[Any]) -> list[str]:
        calls.append(prompts)
        return [str(prompt) for prompt in prompts]

    mixed = ["a", as_prompt(PROMPT), "b"]
    assert encode_prompts(reader, mixed, encode) == ["a", str(PROMPT), "b"]
    assert calls == [["a", "b"], [PROMPT]]
    assert encode_prompts(reader, [], encode) == []


def test_a_tokenizer_without_a_chat_template_is_an_error_that_names_the_fix() -> None:
    with pytest.raises(ValueError, match=r"no chat template\. Put a `chat_template.jinja` into the model's folder"):
        encode_prompts(Reader(), [as_prompt(PROMPT)], list)


def test_a_text_that_looks_like_a_conversation_is_a_text() -> None:
    for text in (json.dumps(PROMPT), "\x1e[broken", "\x1e[1, 2]", "\x1e", ""):
        assert as_prompt(text) == text
        assert conversation_in(text) is None
    for wrong in (None, 3, ["a"], [], [{"role": "user"}]):
        with pytest.raises(ValueError, match="is not a prompt: "):
            as_prompt(wrong)
