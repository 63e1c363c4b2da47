"""Reading pairs, training a tokenizer, and writing results that are never half there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from benchmarks.tokenizer import train_tokenizer
from modeling_llm2slm.data.loading import load_examples, load_prompts, load_rows, whole_row
from modeling_llm2slm.data.records import versions


PAIRS = [
    {"prompt": "A man, alone.", "target": 'Ein "Mann", allein.'},
    {"prompt": "Two\nlines", "target": "Größe\tund Maß"},
    {"prompt": "", "target": "nichts"},
]


def write(path: Path) -> Path:
    dataset = Dataset.from_list(PAIRS)
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    match path.suffixes:
        case [".jsonl"]:
            path.write_text(lines, encoding="utf-8")
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress(lines.encode()))
        case [".json"]:
            path.write_text(json.dumps(PAIRS), encoding="utf-8")
        case [".parquet"]:
            dataset.to_parquet(path)
        case [".csv", ".gz"]:
            plain = path.with_suffix("")
            dataset.to_csv(plain, index=False)
            path.write_bytes(gzip.compress(plain.read_bytes()))
        case [".csv"] | [".tsv"]:
            dataset.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".tsv", ".parquet"])
def test_every_format_gives_the_same_pairs(tmp_path, suffix):
    assert load_examples(write(tmp_path / f"pairs{suffix}"), limit=2).to_list() == PAIRS[:2]


def test_columns_may_have_other_names_and_others_are_left(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"id": 7, "source": "a", "target": "b"}\n')
    assert load_examples(path, "source", "target").to_list() == [{"prompt": "a", "target": "b"}]


def test_several_answers_give_a_row_several_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "a": "1", "b": "2"}\n{"prompt": "q", "a": "3", "b": "4"}\n')
    pairs = load_examples(path, target_column=["b", "a"], number_rows=True)
    assert pairs["prompt"][:] == ["p", "p", "q", "q"]
    assert pairs["target"][:] == ["2", "1", "4", "3"]
    assert pairs["row"][:] == [0, 0, 1, 1]
    assert load_examples(path, "a", "a").to_list() == [{"prompt": "1", "target": "1"}, {"prompt": "3", "target": "3"}]


def test_prompts_come_alone_or_with_what_else_there_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 7, "source": "a", "prompt": "x"}\n')
    assert load_prompts(path, "source").to_list() == [{"prompt": "a"}]
    rows = load_rows(path, "source")
    assert rows["source"][:] == ["a"]
    assert whole_row(rows[0]) == {"id": 7, "source": "a", "prompt": "x"}
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert load_prompts(tmp_path / "lines.txt")["prompt"][:] == ["one", "two"]
    assert load_rows(tmp_path / "lines.txt", "source").to_list() == [{"source": "one"}, {"source": "two"}]


def test_rows_of_json_are_what_the_file_says(tmp_path):
    """Whatever rows have in common, and also where one of them cannot be read."""
    rows = [
        {"prompt": "2024-01-01", "target": "2024-01-02T03:04:05Z", "x": "2024-01-01", "y": 1.0, "z": None},
        {"prompt": "\u2028", "target": "b", "x": ["2024-01-01", {"1": "\ud83d"}], "y": 10**30},
        {"z": {"b": 1}, "prompt": "c", "target": "\x85"},
    ]
    path = tmp_path / "rows.jsonl"
    for first in ("", "\ufeff", "{\n"):
        path.write_text(first + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = [whole_row(row) for row in load_rows(path, skip_bad_rows=True)]
        assert found == rows
        assert [list(row) for row in found] == [list(row) for row in rows]
        pairs = load_examples(path, skip_bad_rows=True).to_list()
        assert pairs == [{name: row[name] for name in ("prompt", "target")} for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_that_are_wrong_are_numbered_and_left_out_on_request(tmp_path, suffix, caplog):
    lines = ['{"prompt": "a", "target": "b"}', '{"prompt": "a"', "", "[1]", '{"prompt": "c", "target": "d", "x": 1}']
    path = tmp_path / f"pairs{suffix}"
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(ValueError, match=r"row 1 is not JSON \(.*\)\. There are 2 bad rows: 1, 2\. Mend them, or"):
        load_examples(path)
    pairs = load_examples(path, skip_bad_rows=True, number_rows=True)
    assert pairs.to_list() == [{"prompt": "a", "target": "b", "row": 0}, {"prompt": "c", "target": "d", "row": 3}]
    assert "2 bad rows were skipped: 1, 2." in caplog.text
    path.write_bytes(
        gzip.compress(content.replace(b"c", b"e")) if suffix.endswith(".gz") else content.replace(b"c", b"e")
    )
    assert load_examples(path, skip_bad_rows=True)["prompt"][:] == ["a", "e"]  # what was read before is not used again


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_that_is_no_text_spoils_one_row(tmp_path, end, caplog):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"p{row}", "target": "é"}, ensure_ascii=False).encode() for row in range(3000)]
    lines[1000] = lines[1000].replace("é".encode(), "é".encode("latin-1"))
    path.write_bytes(end.encode().join(lines))
    with pytest.raises(ValueError, match="row 1000 is not JSON .*utf-8"):
        load_examples(path)
    pairs = load_examples(path, skip_bad_rows=True, number_rows=True)
    assert pairs["row"][:] == [*range(1000), *range(1001, 3000)]
    assert "1 bad rows were skipped: 1000. The last: row 1000 is not JSON" in caplog.text


def test_an_archive_that_is_cut_is_told_also_where_rows_are_skipped(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl.gz"
    lines = "".join(json.dumps({"prompt": f"{row**5}", "target": "a"}) + "\n" for row in range(5000))
    path.write_bytes(gzip.compress(lines.encode())[:-500])
    assert 0 < len(load_examples(path, skip_bad_rows=True)) < 5000
    assert "The last: the rest cannot be read" in caplog.text


def test_words_of_a_table_are_words(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,answer\nNA,null\n,nan\n")
    assert load_examples(path).to_list() == [{"prompt": "NA", "target": "null"}, {"prompt": "", "target": "nan"}]


def test_all_in_a_table_is_text_whatever_its_first_rows_are(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,answer,score\n" + "007,1.50,1\n" * 10_500 + "a,b,\nc,d\n")
    rows = load_rows(path)
    assert [rows[0], *rows.select(range(10_500, 10_502))] == [
        {"prompt": "007", "target": "1.50", "score": "1"},
        {"prompt": "a", "target": "b", "score": ""},
        {"prompt": "c", "target": "d", "score": ""},
    ]
    assert load_examples(path, limit=1).to_list() == [{"prompt": "007", "target": "1.50"}]


@pytest.mark.parametrize(
    "header",
    ['prompt,"the, answer"', '\ufeffprompt,"the, answer"', '\nprompt,"the, answer",x,x', ',prompt,"the, answer"'],
)
def test_headers_of_all_kinds(tmp_path, header):
    path = tmp_path / "pairs.csv"
    before = "0," if header.startswith(",") else ""
    path.write_text(f"{header}\n{before}a,b" + ",1,2" * header.endswith("x,x") + "\n", encoding="utf-8")
    assert load_examples(path, target_column="the, answer").to_list() == [{"prompt": "a", "target": "b"}]


def test_empty_texts_are_texts(tmp_path):
    assert load_examples(write(tmp_path / "pairs.jsonl"))["prompt"][2] == ""


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'target'; it has 'prompt', 'answer'"):
        load_examples(write(tmp_path / "pairs.jsonl"), "prompt", "target")


@pytest.mark.parametrize("name", ["no.jsonl", "no/such/folder", "no.parquet"])
def test_a_missing_file_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no data file"):
        load_examples(tmp_path / name)


def test_a_data_set_that_cannot_be_reached_is_an_error_of_one_line():
    with pytest.raises(FileNotFoundError, match="neither a file nor a data set") as caught:
        load_examples("nobody/nothing")
    assert "\n" not in str(caught.value)


TORN = gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-15] + b"\xff" * 15


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", b'{"prompt": "a", "target": \n', "cannot be read as json"),
        ("pairs.parquet", b"PAR1 but no more", "cannot be read as parquet"),
        ("pairs.jsonl.gz", b"not gzip", "cannot be read as json"),
        (
            "pairs.jsonl",
            b'{"prompt": "a", "target": "b"}\n{"prompt": "a", "target": null}\n',
            "answer of row 1 is None",
        ),
        ("pairs.jsonl", b'{"prompt": 3, "target": "b"}\n', "prompt of row 0 is 3"),
        ("pairs.jsonl", rb'{"prompt": "a", "target": "\ud83d"}', r"answer of row 0 is '\\ud83d', not a text"),
        ("pairs.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "target": "b"}', "answer of row 0 is None"),
        ("pairs.jsonl", b"\n\n", "holds no rows"),
        ("pairs.jsonl.gz", TORN, "cannot be read as json"),
        ("pairs.csv", b"prompt,answer\n", "holds no rows"),
        ("pairs.jsonl", b"", "holds no rows"),
        ("pairs.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("pairs.csv", b"", "holds no rows"),
        ("pairs.txt", b"a prompt\n", "has prompts and no answers: .* --against"),
        ("pairs.xml", b"a b", "ending of the name"),
    ],
)
def test_what_cannot_be_used_is_an_error_of_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(tmp_path / name)
    assert "\n" not in str(caught.value)


TEXTS = ["Der Hund läuft über die Straße.", "The dog runs, the dog sleeps.", "Zwei Hunde (3 und 14) laufen!"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=80)


def test_a_tokenizer_gives_texts_back_and_loads_anew(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], "Straße über Hund (41)!"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert reloaded(text)["input_ids"] == ids


def test_special_tokens_are_where_a_t5_expects_them(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 80


def test_punctuation_and_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("runs, 14")[-4:] != ["▁runs,", "▁14"]
    for token in tokenizer.get_vocab():
        letters = any(letter.isalpha() for letter in token)
        assert not letters or not set(token) & set(".,()!0123456789"), token


def test_versions_are_those_installed():
    import torch

    assert versions()["torch"] == torch.__version__
