"""A stream has every example in every pass, in another order, and workers share the examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from modeling_llm2slm.data.streaming import StreamedFeatures, StreamSettings
from tests.support.checkpoints import PAIRS, PROMPTS, write_pairs


BAD_LINES = ['{"prompt": "src1", "target": null}', '{"prompt": "src1"', '{"prompt": "src1", "target": 7}', "[1]"]


def features(prompts: list[str], targets: list[str]) -> dict[str, list[Any]]:
    words = [[text.split() for text in texts] for texts in (prompts, targets)]
    return {"prompts": prompts, "input_ids": words[0], "labels": words[1]}


def no_problems(features: dict[str, list[Any]]) -> list[str | None]:
    return [None] * len(features["labels"])


def make_stream(data: str, **overrides: Any) -> StreamedFeatures:
    values: dict[str, Any] = {"batch_size": 2, "buffer": 4} | overrides
    return StreamedFeatures(data, features, no_problems, StreamSettings(**values))


def take(stream: StreamedFeatures, count: int) -> list[str]:
    return [row["prompts"] for row, _ in zip(stream, range(count), strict=False)]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_pass_has_every_example_in_another_order(tmp_path: Path, grouped: bool) -> None:
    stream = make_stream(write_pairs(tmp_path / "p.jsonl"), group_by_length=grouped, buffer=8)
    taken = take(stream, 3 * len(PAIRS))
    passes = [taken[start : start + len(PAIRS)] for start in range(0, len(taken), len(PAIRS))]
    assert all(sorted(each) == sorted(PROMPTS) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert take(stream, 5) == taken[:5]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_every_format_streams(tmp_path: Path, suffix: str) -> None:
    dataset, path = Dataset.from_list(PAIRS), tmp_path / f"p{suffix}"
    {".csv": dataset.to_csv, ".parquet": dataset.to_parquet}.get(suffix, dataset.to_json)(path)
    assert sorted(take(make_stream(str(path)), len(PAIRS))) == sorted(PROMPTS)


@pytest.fixture
def of_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make this process one of two workers. test_fine_tuning has a training with real workers."""

    def be(number: int) -> None:
        worker = SimpleNamespace(id=number, num_workers=2)
        monkeypatch.setattr("modeling_llm2slm.data.streaming.get_worker_info", lambda: worker)

    return be


def test_workers_share_the_examples(tmp_path: Path, of_worker: Callable[[int], None]) -> None:
    stream = make_stream(write_pairs(tmp_path / "p.jsonl"))
    rows = []
    for number in range(2):
        of_worker(number)
        taken = take(stream, len(PAIRS))
        share = len(PAIRS) // 2
        assert sorted(taken[:share]) == sorted(taken[share:])
        rows += taken[:share]
    assert sorted(rows) == sorted(PROMPTS)


@pytest.mark.parametrize("lines", [BAD_LINES[:1] * 3, [json.dumps(PAIRS[0])] * 3])
def test_a_pass_without_a_usable_row_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    """Rows without text, and rows that are too long for the model."""
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    stream = make_stream(str(tmp_path / "p.jsonl"), skip_bad_rows=True)
    stream.problems = lambda features: ["is too long"] * len(features["labels"])
    with pytest.raises(ValueError, match="no row can be used"):
        take(stream, 1)


SURROGATE = '{"prompt": "\\ud83d", "target": "x"}'


def test_a_first_row_without_a_column_is_a_bad_row(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "p.jsonl", [{"prompt": "src1"}, *PAIRS])
    with pytest.raises(ValueError, match="has no column 'target'"):
        make_stream(data)
    assert sorted(take(make_stream(data, skip_bad_rows=True), len(PAIRS))) == sorted(PROMPTS)
    with pytest.raises(ValueError, match="has no column 'target'"):
        make_stream(write_pairs(tmp_path / "all.jsonl", [{"prompt": "src1"}] * 3), skip_bad_rows=True)


def test_skipped_rows_are_reported_once_with_their_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [json.dumps(pair) for pair in PAIRS]
    (tmp_path / "p.jsonl").write_text("\n".join([BAD_LINES[0], *good[:3], SURROGATE, *good[3:]]) + "\n")
    stream = make_stream(str(tmp_path / "p.jsonl"), buffer=100, skip_bad_rows=True)
    stream.problems = lambda features: ["is too long" if text == PROMPTS[3] else None for text in features["prompts"]]
    taken = take(stream, 3 * (len(PAIRS) - 1))
    assert set(taken) == set(PROMPTS) - {PROMPTS[3]}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'p.jsonl'}: 3 bad rows were skipped: 0, 4, 5. The last: row 5 is too long."
    ]
    stream.settings.skip_bad_rows = False
    with pytest.raises(ValueError, match="the target of row 0 is None, not text"):
        take(stream, 1)
    (tmp_path / "p.jsonl").write_text("\n".join([*good[:3], *good[3:]]) + "\n")
    with pytest.raises(ValueError, match="row 3 is too long.*skip_bad_rows"):
        take(stream, 1)


def test_workers_report_each_row_once(
    tmp_path: Path, of_worker: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps(pair) for pair in PAIRS]
    (tmp_path / "p.jsonl").write_text("\n".join([*BAD_LINES[:1], *good]) + "\n")
    stream = make_stream(str(tmp_path / "p.jsonl"), skip_bad_rows=True)
    for number in range(2):
        of_worker(number)
        take(stream, 3 * len(PAIRS))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'p.jsonl'}: 1 bad row was skipped: 0. The last: the target of row 0 is None, not text."
    ]


def test_unusable_data_is_an_error_and_a_bad_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data file"):
        make_stream(str(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no rows"):
        make_stream(str(tmp_path / "empty.jsonl"))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(PAIRS[0]), *BAD_LINES]) + "\n")
    with pytest.raises(ValueError, match="target of row 1 is None"):
        take(make_stream(str(path)), 3)
    assert take(make_stream(str(path), skip_bad_rows=True), 2) == [PROMPTS[0]] * 2
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make_stream(write_pairs(path, [{"x": "a"}]))
