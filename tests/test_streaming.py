"""Pairs that are read while they are trained on: every row in every pass, in another order, shared by workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from checkpoints import PAIRS, PROMPTS, write_pairs
from modeling_llm2slm.streaming import StreamedFeatures


BAD_LINES = ['{"prompt": "src1", "answer": null}', '{"prompt": "src1"', '{"prompt": "src1", "answer": 7}', "[1]"]


def features(prompts: list[str], answers: list[str]) -> dict[str, list[Any]]:
    return {"prompts": prompts, "labels": [answer.split() for answer in answers]}


def make_stream(data: str, **overrides: Any) -> StreamedFeatures:
    values: dict[str, Any] = {"batch_size": 2, "buffer": 4} | overrides
    return StreamedFeatures(data, "prompt", ["answer"], features, **values)


def take(stream: StreamedFeatures, count: int) -> list[str]:
    return [row["prompts"] for row, _ in zip(stream, range(count), strict=False)]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_pass_has_every_row_in_another_order(tmp_path: Path, grouped: bool) -> None:
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


def test_workers_share_the_rows(tmp_path: Path) -> None:
    stream = make_stream(write_pairs(tmp_path / "p.jsonl"))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    rows = [row["prompts"] for row, _ in zip(loader, range(len(PAIRS)), strict=False)]
    assert sorted(rows) == sorted(PROMPTS)


@pytest.mark.parametrize("lines", [BAD_LINES[:1] * 3, [json.dumps(PAIRS[0])] * 3])
def test_a_pass_without_a_row_that_can_be_used_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    """Rows without texts, and rows that the model has no room for."""
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    stream = make_stream(str(tmp_path / "p.jsonl"), skip_bad_rows=True)
    stream.features = lambda prompts, answers: {"prompts": [], "labels": []}
    with pytest.raises(ValueError, match="no row can be used"):
        take(stream, 1)


def test_what_is_wrong_is_said_before_or_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data file"):
        make_stream(str(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no rows"):
        make_stream(str(tmp_path / "empty.jsonl"))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(PAIRS[0]), *BAD_LINES]) + "\n")
    with pytest.raises(ValueError, match="answer of row 1 is None"):
        take(make_stream(str(path)), 3)
    assert take(make_stream(str(path), skip_bad_rows=True), 2) == [PROMPTS[0]] * 2
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make_stream(write_pairs(path, [{"x": "a"}]))
