"""JSON files of checkpoints that are damaged: each is named, with the field, before a library reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.files import check_files


CONTENTS = {
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "text": b'"x"',
    "empty": b"",
    "truncated": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "nested": b"[" * 100_000 + b"]" * 100_000,
}
NAMES = ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json")
FIELDS: dict[str, list[dict[str, Any]]] = {
    "config.json": [{"model_type": 3}],
    "generation_config.json": [
        {"num_beams": "many"}, {"num_beams": 0}, {"num_beams": 10**9}, {"num_beams": True}, {"num_beams": [2]},
        {"max_new_tokens": "x"}, {"max_new_tokens": -1}, {"max_length": 0}, {"temperature": "hot"},
        {"temperature": float("nan")}, {"top_p": [0.5]}, {"top_k": 0.5}, {"do_sample": "yes"}, {"use_cache": 1},
        {"eos_token_id": "end"}, {"eos_token_id": [1, "end"]}, {"pad_token_id": [0]}, {"bos_token_id": {"a": 1}},
        {"repetition_penalty": float("inf")}, {"no_repeat_ngram_size": "two"}, {"length_penalty": None, "top_p": {}},
        {"assistant_early_exit": 1}, {"bad_words_ids": "x"}, {"bad_words_ids": [1]}, {"bad_words_ids": [["x"]]},
        {"forced_bos_token_id": "x"},
    ],
    "tokenizer_config.json": [
        {"model_max_length": "long"}, {"model_max_length": -1}, {"padding_side": "up"}, {"eos_token": 7},
        {"added_tokens_decoder": [1]},
    ],
    "processor_config.json": [
        {"prompt_max_length": "x"}, {"prompt_max_length": 0}, {"target_max_length": 1}, {"target_max_length": 2.5},
    ],
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_holds_no_mapping_is_named(copies: dict[str, Path], name: str, content: str) -> None:
    for path in copies.values():
        if name == "processor_config.json" and path.name != "llm2slm":
            continue
        (path / name).write_bytes(CONTENTS[content])
        with pytest.raises(OSError, match=f"{name} (is truncated or corrupted|cannot be read)") as caught:
            TextToText.from_pretrained(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"), [(name, values) for name, choices in FIELDS.items() for values in choices], ids=str
)
def test_a_field_of_another_kind_is_named(copies: dict[str, Path], name: str, values: dict[str, Any]) -> None:
    path = copies["llm2slm"]
    field = [field for field, value in values.items() if value is not None][0]
    content = json.loads((path / name).read_text(encoding="utf-8"))
    (path / name).write_text(json.dumps({**content, **values}), encoding="utf-8")
    with pytest.raises(OSError, match=rf"{name} cannot be read: {field} is .*, but it must be .*\. Correct the file"):
        TextToText.from_pretrained(path)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["model.safetensors"]}])
def test_an_index_without_files_is_named(copies: dict[str, Path], weight_map: Any) -> None:
    for path in copies.values():
        (path / "model.safetensors").unlink()
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        with pytest.raises(OSError, match="model.safetensors.index.json cannot be read: weight_map is"):
            TextToText.from_pretrained(path)


def test_the_tokenizer_of_outputs_is_checked_too(copies: dict[str, Path]) -> None:
    (copies["llm2slm"] / "decoder_tokenizer" / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(OSError, match="decoder_tokenizer/tokenizer_config.json cannot be read"):
        TextToText.from_pretrained(copies["llm2slm"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_of_a_config_that_is_not_finite_is_named(copies: dict[str, Path], value: float) -> None:
    for path in copies.values():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        part, name = (config["decoder"], "decoder.") if path.name == "llm2slm" else (config, "")
        part["initializer_factor"] = value
        part["limits"] = [0, float("inf")]  # as configs of Mamba have them
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(OSError, match=rf"config.json cannot be read: {name}initializer_factor is -?(nan|inf)"):
            TextToText.from_pretrained(path)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "x"), ("vocab_size", [3]), ("num_hidden_layers", 2.5)])
def test_a_value_of_a_config_with_a_wrong_type_is_shown(copies: dict[str, Path], name: str, value: Any) -> None:
    for path in copies.values():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (config["decoder"] if path.name == "llm2slm" else config)[name] = value
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(
            OSError, match=r"expected int, got (str|list)|has hidden size 'x'|has 2.5 layers"
        ) as caught:
            TextToText.from_pretrained(path)
        assert "Error" not in str(caught.value)
        assert "\n" not in str(caught.value)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_loop])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_what_is_no_file_is_named(copies: dict[str, Path], name: str, make: Any) -> None:
    for path in copies.values():
        (path / name).unlink()
        make(path / name)
        with pytest.raises(OSError, match=rf"{name}( is a pipe| is a folder|\.)"):
            TextToText.from_pretrained(path)


def test_a_pipe_in_place_of_weights_is_named(copies: dict[str, Path]) -> None:
    for path in copies.values():
        (path / "model.safetensors").unlink()
        os.mkfifo(path / "model.safetensors")
        with pytest.raises(OSError, match=r"model.safetensors is a pipe or a device, but a file is needed\."):
            TextToText.from_pretrained(path)


def test_a_tokenizer_without_a_vocabulary_is_named(copies: dict[str, Path]) -> None:
    for path in [*copies.values(), copies["llm2slm"] / "decoder_tokenizer"]:
        vocabulary = (path / "tokenizer.json").read_bytes()
        (path / "tokenizer.json").unlink()
        with pytest.raises(
            OSError, match=rf"{path.name} has neither tokenizer.json nor .*: its tokenizer is empty\. Corr"
        ):
            TextToText.from_pretrained(copies["llm2slm"] if path.name == "decoder_tokenizer" else path)
        (path / "tokenizer.json").write_bytes(vocabulary)


@pytest.mark.parametrize(
    ("tokenizer_class", "files", "is_complete"),
    [
        ("GPT2Tokenizer", ["vocab.json"], False),
        ("GPT2Tokenizer", ["vocab.json", "merges.txt"], True),
        ("T5Tokenizer", ["spiece.model"], True),
        ("T5Tokenizer", [], False),
        ("LlamaTokenizer", ["tekken.json"], True),
        ("BertTokenizer", ["vocab.txt"], True),
        ("BertTokenizer", ["vocab.json"], False),
        ("ByT5Tokenizer", [], True),
        ("TokenizerOfSomebody", [], True),
        (None, [], True),
    ],
)
def test_the_vocabulary_of_each_tokenizer_is_looked_for(
    tmp_path: Path, tokenizer_class: str | None, files: list[str], is_complete: bool
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}), encoding="utf-8")
    for name in files:
        (tmp_path / name).touch()
    if is_complete:
        check_files(tmp_path)
        return
    with pytest.raises(OSError, match="its tokenizer is empty"):
        check_files(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "decoder_tokenizer/tokenizer.json"])
def test_a_file_that_is_cut_short_is_named(copies: dict[str, Path], name: str) -> None:
    for path in copies.values():
        if (path / name).is_file():
            (path / name).write_bytes((path / name).read_bytes()[:-100])
            with pytest.raises(OSError, match=rf"cannot be loaded: .*{name} is truncated or corrupted \(.*\)\. Take"):
                TextToText.from_pretrained(path)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokenizer_of_outputs_that_cannot_be_loaded_is_not_replaced(
    copies: dict[str, Path], content: str | None
) -> None:
    folder = copies["llm2slm"] / "decoder_tokenizer"
    (folder / "tokenizer.json").unlink()
    if content is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(OSError, match="llm2slm cannot be loaded: ") as caught:
        TextToText.from_pretrained(copies["llm2slm"])
    assert "\n" not in str(caught.value)
