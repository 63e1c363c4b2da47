"""Bounded parsing: JSON, YAML and rows of any size and depth end in a value or in one sentence, quickly."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from modeling_llm2slm.data.formats import ROW_ERROR, parse_rows
from modeling_llm2slm.data.loading import load_examples, load_rows, whole_row
from modeling_llm2slm.data.parsing import MAX_DEPTH, parse_json, parse_yaml, read_json, read_yaml
from modeling_llm2slm.data.streaming import StreamedFeatures, StreamSettings
from modeling_llm2slm.settings import DataSettings


DEEP = {depth: "[" * depth + "]" * depth for depth in (MAX_DEPTH + 1, 5_000, 100_000)}
ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 40)
)


class TestJson:
    @pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "\\ud83d"]}', "[" * MAX_DEPTH + "]" * MAX_DEPTH, '"[[["'])
    def test_what_the_bounds_allow_is_read_as_the_standard_library_does(self, text):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)

    @pytest.mark.parametrize("depth", DEEP)
    @pytest.mark.parametrize("pattern", ["{}", '{{"a": {}}}'])
    def test_deep_nesting_is_an_error(self, depth, pattern):
        with pytest.raises(ValueError, match="nested more than 100 levels deep"):
            parse_json(pattern.format(DEEP[depth]))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": ', "is not JSON: Expecting value"),
            (b"\xff\xfe", "not UTF-8"),
            (b"9" * 5000, "thousands of digits"),
            (b" " * (2**26 + 1), "more than 67,108,864 bytes"),
        ],
    )
    def test_a_file_is_named(self, tmp_path, content, message):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.json .*{message}"):
            read_json(tmp_path / "x.json")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("012", 12), ("0o14", 12), ("0x1F", 31), ("+7", 7), ("-0", 0), ("1:30", "1:30"), ("0b11", "0b11"),
            ("1_000", "1_000"), ("2026-01-31", "2026-01-31"), ("12.0", 12.0), ("1e-3", 0.001),
            ("{a: &x {b: 1}, c: {<<: *x, b: 2}, d: *x}", {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1}}),
        ],
    )  # fmt: skip
    def test_values_are_read_by_the_rules_of_yaml_1_2(self, text, value):
        read = parse_yaml(text)
        assert (read, type(read)) == (value, type(value))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (ALIASES, "more than 100,000 values"),
            ("&a [*a]", "an alias stands inside the value that it repeats"),
            ("[" * 100_000, "nested more than 100 levels"),
            ("- " * 5_000 + "x", "nested more than 100 levels"),
            ("{a: 1, b: 2, a: 3}", "the key 'a' stands in one mapping twice"),
            ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
            ("!!int x", "invalid literal"), ("!!float x", "could not convert"), ("!!bool x", "x"),
            ("!!timestamp x", "."), ("? [a]\n: 1", "unhashable"), ("a: b: c", "mapping values are not allowed"),
            ("x" * 2**21, "more than 1,048,576 characters"), ("9" * 5000, "thousands of digits"), ("*a", "undefined"),
            ("a\0b", "special characters"),
        ],
    )  # fmt: skip
    def test_hostile_texts_are_errors_of_one_line_and_take_no_time(self, text, message):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=message) as caught:
            parse_yaml(text)
        assert time.perf_counter() - start < 5
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600

    def test_a_file_is_named(self, tmp_path):
        (tmp_path / "x.yaml").write_bytes(b"a: \xe9")
        with pytest.raises(ValueError, match=r"x\.yaml: line 1 is not UTF-8 \(byte 0xe9\)"):
            read_yaml(tmp_path / "x.yaml")


GOOD = [{"prompt": "a, b", "target": "c"}, {"prompt": 'd "e"', "target": "[{"}]
BAD_JSON = [
    DEEP[100_000], '{"a": ' + DEEP[5_000] + "}", "7", '"text"', "[1]", '{"prompt": 1e999, "target": ""}',
    '{"prompt": ' + "9" * 5000 + "}", '{"prompt": "a", "target": NaN}', '{"prompt": "\\ud83d", "target": "b"}',
    '{"prompt": ["a"], "target": {"b": 1}}', '{"prompt": "a", "target": "b\n"}',
    '{"prompt": "x", "target": "' + "y" * 2**24 + '"}', '{"prompt": "a" "target"}',
]  # fmt: skip
BAD_TABLE = [
    "a,b,c", '"a\udce9",b', "a", f"{'y' * (2**24 + 1)},a", "a,\udcff",
]  # fmt: skip


PROMPTS_ALONE = ("a", "a,\udcff", *BAD_JSON[7:8])  # rows without a target


def write(path: Path, bad: str) -> None:
    """A file whose second row, of three, is bad."""
    good = list(map(json.dumps, GOOD))
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in GOOD]
    content = {
        ".jsonl": "\n".join([good[0], bad.replace("\n", " \\n"), good[1]]),
        ".json": f" [{good[0]}, {bad} , {good[1]}]",
        ".csv": "\n".join(["prompt,target", quoted[0], bad, quoted[1]]),
        ".tsv": "\n".join(["prompt,target", quoted[0], bad, quoted[1]]).replace(",", "\t").replace("a\t b", "a, b"),
    }[path.suffixes[0]].encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    ("suffix", "bad"),
    [
        *[(".jsonl", bad) for bad in BAD_JSON if "\n" not in bad],  # two lines are two rows
        *[(suffix, bad) for suffix in (".json", ".json.gz") for bad in BAD_JSON],
        *[(suffix, bad) for suffix in (".csv", ".csv.gz", ".tsv") for bad in BAD_TABLE],
    ],
    ids=lambda text: text[:12],
)
def test_a_bad_row_is_a_bad_row_in_every_format(tmp_path, caplog, suffix, bad):
    path = tmp_path / f"rows{suffix}"
    write(path, bad)
    with pytest.raises(ValueError, match=r"row 1 .*Fix it, or skip it with --skip-bad-rows") as caught:
        load_examples(path)
    assert len(str(caught.value)) < 600
    skipping = DataSettings(skip_bad_rows=True)
    examples = load_examples(path, skipping, number_rows=True)
    assert examples.to_list() == [{**GOOD[0], "row": 0}, {**GOOD[1], "row": 2}]
    assert "1 bad row was skipped: 1." in caplog.text
    if bad not in PROMPTS_ALONE:
        assert [whole_row(row) for row in load_rows(path, skipping)] == GOOD
    settings = StreamSettings(batch_size=1, skip_bad_rows=True)
    stream = StreamedFeatures(
        str(path), lambda prompts, targets: {"labels": prompts}, lambda f: [None] * len(f["labels"]), settings
    )
    rows = iter(stream)
    assert sorted(next(rows)["labels"] for _ in range(2)) == sorted(row["prompt"] for row in GOOD)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.json", '[{"a": 1}, {"a": 2}', 1),
        ("a.json", "[", 0),
        ("a.json", '[{"a": "x', 0),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', 1),
    ],
)
def test_the_rest_of_a_torn_file_is_reported(tmp_path, name, content, rows):
    (tmp_path / name).write_text(content)
    read = list(parse_rows(tmp_path / name))
    assert len(read) == rows + 1
    assert ROW_ERROR in read[-1]
