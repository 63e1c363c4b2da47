"""Rows in folders of files, and at addresses of other filesystems."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from modeling_llm2slm.data.loading import load_prompts
from modeling_llm2slm.settings import DataSettings


ROWS = [{"prompt": f"row {number}"} for number in range(5)]
TEXTS = [row["prompt"] for row in ROWS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JSON lines as Spark writes them: parts, one of them compressed, and files that are no data."""
    lines = [json.dumps(row) for row in ROWS]
    place = tmp_path / "rows"
    place.mkdir()
    (place / "part-0.jsonl").write_text("\n".join(lines[:2]))
    (place / "part-1.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[2:]).encode()))
    (place / "_SUCCESS").touch()
    (place / "_log.jsonl").write_text("{}")
    return place


def test_a_folder_is_read_in_the_order_of_its_files(folder: Path) -> None:
    assert load_prompts(folder)["prompt"][:] == TEXTS
    assert load_prompts(f"file://{folder}")["prompt"][:] == TEXTS


def test_parquet_at_an_address(tmp_path: Path) -> None:
    for number in range(2):
        Dataset.from_list(ROWS[number::2]).to_parquet(tmp_path / f"part-{number}.parquet")
    assert load_prompts(f"file://{tmp_path}/part-0.parquet")["prompt"][:] == TEXTS[::2]
    assert load_prompts(f"file://{tmp_path}")["prompt"][:] == TEXTS[::2] + TEXTS[1::2]


def test_a_text_file_at_an_address(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    assert load_prompts(f"file://{tmp_path}/prompts.txt")["prompt"][:] == TEXTS


def test_what_cannot_be_read_is_named_by_its_address(folder: Path) -> None:
    address = f"file://{folder}"
    (folder / "part-2.jsonl").write_text('{"prompt": 7}\n')
    with pytest.raises(ValueError, match=f"{address}: the prompt of row 5 is 7, not text"):
        load_prompts(address)
    assert load_prompts(address, DataSettings(skip_bad_rows=True))["prompt"][:] == TEXTS
    with pytest.raises(ValueError, match=f"{address} has no column 'text'"):
        load_prompts(address, DataSettings(prompt_column="text"))
    with pytest.raises(FileNotFoundError, match="There is nothing at"):
        load_prompts(f"{address}/none.jsonl")
    with pytest.raises(ValueError, match="foo://bucket/rows.jsonl cannot be read"):
        load_prompts("foo://bucket/rows.jsonl")
    (folder / "part-3.parquet").touch()
    with pytest.raises(ValueError, match="holds files of several formats"):
        load_prompts(folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder without Parquet or JSON lines"):
        load_prompts(folder / "empty")
