"""Loading examples, prompts and rows: every format, every kind of bad row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from modeling_llm2slm.data.loading import load_examples, load_prompts, load_rows, whole_row
from modeling_llm2slm.settings import DataSettings


EXAMPLES = [
    {"prompt": "A man, alone.", "target": 'Ein "Mann", allein.'},
    {"prompt": "Two\nlines", "target": "Größe\tund Maß"},
    {"prompt": "", "target": "nichts"},
]


def write(path: Path) -> Path:
    dataset = Dataset.from_list(EXAMPLES)
    lines = "".join(json.dumps(example) + "\n" for example in EXAMPLES)
    match path.suffixes:
        case [".jsonl"]:
            path.write_text(lines, encoding="utf-8")
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress(lines.encode()))
        case [".json"]:
            path.write_text(json.dumps(EXAMPLES), encoding="utf-8")
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
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    assert load_examples(write(tmp_path / f"pairs{suffix}"), DataSettings(limit=2)).to_list() == EXAMPLES[:2]


def test_columns_may_have_other_names_and_further_ones_are_ignored(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"id": 7, "source": "a", "target": "b"}\n')
    assert load_examples(path, DataSettings(prompt_column="source")).to_list() == [{"prompt": "a", "target": "b"}]


def test_several_target_columns_give_several_examples_per_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "a": "1", "b": "2"}\n{"prompt": "q", "a": "3", "b": "4"}\n')
    examples = load_examples(path, target_column=["b", "a"], number_rows=True)
    assert examples["prompt"][:] == ["p", "p", "q", "q"]
    assert examples["target"][:] == ["2", "1", "4", "3"]
    assert examples["row"][:] == [0, 0, 1, 1]
    assert load_examples(path, DataSettings(prompt_column="a"), "a").to_list() == [
        {"prompt": "1", "target": "1"},
        {"prompt": "3", "target": "3"},
    ]


def test_prompts_come_alone_or_with_all_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 7, "source": "a", "prompt": "x"}\n')
    assert load_prompts(path, DataSettings(prompt_column="source")).to_list() == [{"prompt": "a"}]
    rows = load_rows(path, DataSettings(prompt_column="source"))
    assert rows["source"][:] == ["a"]
    assert whole_row(rows[0]) == {"id": 7, "source": "a", "prompt": "x"}
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert load_prompts(tmp_path / "lines.txt")["prompt"][:] == ["one", "two"]
    assert load_rows(tmp_path / "lines.txt", DataSettings(prompt_column="source")).to_list() == [
        {"source": "one"},
        {"source": "two"},
    ]


def test_json_rows_keep_their_values_exactly(tmp_path):
    """Whichever types the rows share, and even if one of them cannot be read."""
    rows = [
        {"prompt": "2024-01-01", "target": "2024-01-02T03:04:05Z", "x": "2024-01-01", "y": 1.0, "z": None},
        {"prompt": "\u2028", "target": "b", "x": ["2024-01-01", {"1": "\ud83d"}], "y": 10**30},
        {"z": {"b": 1}, "prompt": "c", "target": "\x85"},
    ]
    path = tmp_path / "rows.jsonl"
    for first in ("", "\ufeff", "{\n"):
        path.write_text(first + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = [whole_row(row) for row in load_rows(path, DataSettings(skip_bad_rows=True))]
        assert found == rows
        assert [list(row) for row in found] == [list(row) for row in rows]
        examples = load_examples(path, DataSettings(skip_bad_rows=True)).to_list()
        assert examples == [{name: row[name] for name in ("prompt", "target")} for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_lines_are_numbered_and_skipped_on_request(tmp_path, suffix, caplog):
    lines = ['{"prompt": "a", "target": "b"}', '{"prompt": "a"', "", "[1]", '{"prompt": "c", "target": "d", "x": 1}']
    path = tmp_path / f"pairs{suffix}"
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(ValueError, match=r"row 1 is not JSON \(.*\)\. There are 2 bad rows: 1, 2\. Fix them, or"):
        load_examples(path)
    examples = load_examples(path, DataSettings(skip_bad_rows=True), number_rows=True)
    assert examples.to_list() == [{"prompt": "a", "target": "b", "row": 0}, {"prompt": "c", "target": "d", "row": 3}]
    assert "2 bad rows were skipped: 1, 2." in caplog.text
    path.write_bytes(
        gzip.compress(content.replace(b"c", b"e")) if suffix.endswith(".gz") else content.replace(b"c", b"e")
    )
    assert load_examples(path, DataSettings(skip_bad_rows=True))["prompt"][:] == [
        "a",
        "e",
    ]  # the cache of the old file is not used


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_invalid_byte_spoils_only_its_row(tmp_path, end, caplog):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"p{row}", "target": "é"}, ensure_ascii=False).encode() for row in range(3000)]
    lines[1000] = lines[1000].replace("é".encode(), "é".encode("latin-1"))
    path.write_bytes(end.encode().join(lines))
    with pytest.raises(ValueError, match="row 1000 is not JSON .*utf-8"):
        load_examples(path)
    examples = load_examples(path, DataSettings(skip_bad_rows=True), number_rows=True)
    assert examples["row"][:] == [*range(1000), *range(1001, 3000)]
    assert "1 bad row was skipped: 1000. The last: row 1000 is not JSON" in caplog.text


def test_a_truncated_archive_is_reported_even_if_bad_rows_are_skipped(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl.gz"
    lines = "".join(json.dumps({"prompt": f"{row**5}", "target": "a"}) + "\n" for row in range(5000))
    path.write_bytes(gzip.compress(lines.encode())[:-500])
    assert 0 < len(load_examples(path, DataSettings(skip_bad_rows=True))) < 5000
    assert "The last: the rest cannot be read" in caplog.text


def test_cells_that_look_like_missing_values_are_text(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,target\nNA,null\n,nan\n")
    assert load_examples(path).to_list() == [{"prompt": "NA", "target": "null"}, {"prompt": "", "target": "nan"}]


def test_cells_that_look_like_numbers_are_text(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,target,score\n" + "007,1.50,1\n" * 10_500 + "a,b,\nc,d\n")
    rows = load_rows(path)
    assert [rows[0], *rows.select(range(10_500, 10_502))] == [
        {"prompt": "007", "target": "1.50", "score": "1"},
        {"prompt": "a", "target": "b", "score": ""},
        {"prompt": "c", "target": "d", "score": ""},
    ]
    assert load_examples(path, DataSettings(limit=1)).to_list() == [{"prompt": "007", "target": "1.50"}]


@pytest.mark.parametrize(
    "header",
    ['prompt,"the, target"', '\ufeffprompt,"the, target"', '\nprompt,"the, target",x,x', ',prompt,"the, target"'],
)
def test_unusual_headers_of_tables(tmp_path, header):
    path = tmp_path / "pairs.csv"
    before = "0," if header.startswith(",") else ""
    path.write_text(f"{header}\n{before}a,b" + ",1,2" * header.endswith("x,x") + "\n", encoding="utf-8")
    assert load_examples(path, target_column="the, target").to_list() == [{"prompt": "a", "target": "b"}]


def test_an_empty_text_is_text(tmp_path):
    assert load_examples(write(tmp_path / "pairs.jsonl"))["prompt"][2] == ""


def test_a_missing_column_is_named_with_the_existing_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'reply'; it has 'prompt', 'target'"):
        load_examples(write(tmp_path / "pairs.jsonl"), target_column="reply")


@pytest.mark.parametrize("name", ["no.jsonl", "no/such/folder", "no.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no data file"):
        load_examples(tmp_path / name)


def test_a_data_set_that_cannot_be_loaded_is_an_error_of_one_line():
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
            "target of row 1 is None",
        ),
        ("pairs.jsonl", b'{"prompt": 3, "target": "b"}\n', "prompt of row 0 is 3"),
        ("pairs.jsonl", rb'{"prompt": "a", "target": "\ud83d"}', r"target of row 0 is '\\ud83d', not text"),
        ("pairs.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "target": "b"}', "target of row 0 is None"),
        ("pairs.jsonl", b"\n\n", "holds no rows"),
        ("pairs.jsonl.gz", TORN, "cannot be read as json"),
        ("pairs.csv", b"prompt,target\n", "holds no rows"),
        ("pairs.jsonl", b"", "holds no rows"),
        ("pairs.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("pairs.csv", b"", "holds no rows"),
        ("pairs.txt", b"a prompt\n", "has prompts but no targets: .* --against"),
        ("pairs.xml", b"a b", "the extension decides the format"),
    ],
)
def test_unusable_data_is_an_error_of_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(tmp_path / name)
    assert "\n" not in str(caught.value)
