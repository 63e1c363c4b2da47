"""One rule for text: UTF-8, no byte-order mark, and a line ends at a line feed only."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from modeling_llm2slm.data.loading import load_examples, load_prompts
from modeling_llm2slm.data.parsing import read_json
from modeling_llm2slm.data.streaming import StreamedFeatures, StreamSettings
from modeling_llm2slm.data.text import check_text, from_command_line, read_text
from modeling_llm2slm.settings import DataSettings


# What some readers take for line ends, and what has none of its own in a table: a quotation mark inside a text.
ODD = ["a\rb", "a\x0bb", "a\x0cb", "a\x1cb", "a\x85b", "a\u2028b", "a\u2029b", 'say "a"', "\ufeffa", "é💥", "\rb"]
FORMATS = {
    ".txt": lambda texts, end: end.join(texts) + end,
    ".csv": lambda texts, end: end.join(["prompt,target", *(f"{text},x" for text in texts)]) + end,
    ".tsv": lambda texts, end: end.join(["prompt\ttarget", *(f"{text}\tx" for text in texts)]) + end,
    ".jsonl": lambda texts, end: end.join(json.dumps({"prompt": text, "target": "x"}) for text in texts) + end,
    ".json": lambda texts, end: json.dumps([{"prompt": text, "target": "x"} for text in texts], indent=1) + end,
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_reads_the_same_texts(tmp_path: Path, suffix: str, mark: str, end: str, packed: str) -> None:
    path = write(tmp_path / f"rows{suffix}{packed}", (mark + FORMATS[suffix](ODD, end)).encode())
    assert load_prompts(path)["prompt"][:] == ODD
    if suffix == ".txt":
        return

    def features(prompts: list[str], targets: list[str]) -> dict[str, list[str]]:
        return {"prompts": prompts, "labels": targets}

    settings = StreamSettings(batch_size=1, buffer=1)
    stream = StreamedFeatures(str(path), features, lambda found: [None] * len(found["labels"]), settings)
    assert [row["prompts"] for row, _ in zip(stream, ODD, strict=False)] == ODD


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(("wrong", "reason"), [(b"\xff", "0xff"), (b"\xc3", "0xc3"), (b"\0", "NUL")])
def test_a_wrong_byte_is_a_bad_row(tmp_path: Path, suffix: str, wrong: bytes, reason: str) -> None:
    content = FORMATS[suffix](["good", "@@", "fine"], "\n").encode().replace(b"@@", wrong)
    path = write(tmp_path / f"rows{suffix}", content)
    column = "prompt" if suffix != ".txt" else "text"
    with pytest.raises(ValueError, match=rf"rows{suffix}: row 1 .*--skip-bad-rows") as caught:
        load_prompts(path, DataSettings(prompt_column=column))
    if suffix != ".jsonl":
        assert reason in str(caught.value)
    assert load_prompts(path, DataSettings(prompt_column=column, skip_bad_rows=True))["prompt"][:] == ["good", "fine"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [("a,b,c", "row 1 has 3 cells, but the header has 2"), ('a,"b', "row 1 has a quotation mark that is not closed")],
)
def test_a_torn_row_of_a_table_is_a_bad_row(tmp_path: Path, row: str, reason: str) -> None:
    path = write(tmp_path / "rows.csv", f"prompt,target\na,b\n{row}\n".encode())
    with pytest.raises(ValueError, match=reason):
        load_examples(path)
    assert load_examples(path, DataSettings(skip_bad_rows=True)).to_list() == [{"prompt": "a", "target": "b"}]


def test_cells_of_a_table_hold_lines_and_long_texts(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = write(tmp_path / "rows.csv", f'prompt,target\n"two\r\nlines",{long}\n\n  \n"a" b,"c""d"\n'.encode())
    examples = [{"prompt": "two\r\nlines", "target": long}, {"prompt": "a b", "target": 'c"d'}]
    assert load_examples(path).to_list() == examples


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"prompt": "a", "target": "b"}', 1),
        ('{"prompt": "a", "target": "b"}\n{"prompt": "c", "target": "d"}\n', 2),
        ('{\n"prompt": ["a", "c"],\n"target": ["b", "d"]}', 2),
        ('{\n"prompt": "a",\n"target": "b"\n}', 1),
        ('[{"prompt": "a", "target": "b"}]', 1),
    ],
)
def test_a_json_file_holds_rows_in_several_forms(tmp_path: Path, text: str, rows: int) -> None:
    path = write(tmp_path / "rows.json", text.encode())
    expected = [{"prompt": "a", "target": "b"}, {"prompt": "c", "target": "d"}][:rows]
    assert load_examples(path).to_list() == expected


def test_a_text_file_is_read_whole_or_named_with_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", b"\xef\xbb\xbfmodel: a\r\nseed: 1\n")
    assert read_text(path, 100) == "model: a\r\nseed: 1\n"
    assert read_json(write(path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
    for content, message in (
        (b"a: 1\nb: \xff\n", r"recipe\.yaml: line 2 is not UTF-8 \(byte 0xff\)\. Save the file as UTF-8\."),
        (b"a: 1\n\0\n", r"recipe\.yaml: line 2 holds a NUL character"),
        ("a: 1".encode("utf-16"), "recipe.yaml is UTF-16, not UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text(write(path, content), 100)
    with pytest.raises(ValueError, match=r"recipe\.yaml is not JSON"):
        read_json(write(path, b"{"))
    with pytest.raises(ValueError, match=r"recipe\.yaml has more than 3 bytes"):
        read_text(write(path, b"long"), 3)
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        read_text(tmp_path, 100)


def test_text_of_the_command_line_is_utf_8(tmp_path: Path) -> None:
    assert from_command_line("é", "prompt 1") == "é"
    assert from_command_line("\udcc3\udca9", "prompt 1") == "é"  # as Python decodes it where the locale is C
    with pytest.raises(ValueError, match=r"prompt 1 is not UTF-8 \(byte 0xff\)"):
        from_command_line("\udcff", "prompt 1")
    with pytest.raises(ValueError, match="standard input, line 2 holds a NUL"):
        check_text("a\0", "standard input, line 2")


def test_a_header_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"prompt,target,sc\xffore\na,b,1\n")
    with pytest.raises(ValueError, match=r"rows\.csv cannot be read as csv: .*its header is not UTF-8 \(byte 0xff\)"):
        load_examples(path, DataSettings(skip_bad_rows=True))
