"""Distillation: the LLM's outputs in a column of their own, each prompt once, also when runs are killed."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import DataSettings, DistillSettings
from modeling_llm2slm.training.distillation import distill
from tests.support.checkpoints import PAIRS, PROMPTS, sample_by_default, write_checkpoint, write_pairs


OPTIONS = {"num_beams": 2, "max_new_tokens": 5}
SETTINGS = DistillSettings(**OPTIONS)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm", tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def expected(llm: str) -> list[str]:
    return TextToText.from_pretrained(llm).generate(PROMPTS, **OPTIONS)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", [{"id": row, **pair} for row, pair in enumerate(PAIRS)])


def rows_of(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["outputs.jsonl", "outputs.jsonl.gz"])
def test_outputs_are_added_to_the_columns_of_the_data(
    llm: str, data: str, expected: list[str], tmp_path: Path, name: str
) -> None:
    seen: list[tuple[int, int]] = []
    assert (
        distill(llm, data, tmp_path / name, replace(SETTINGS, batch_size=3), progress=lambda *now: seen.append(now))
        == 8
    )
    assert rows_of(tmp_path / name) == [
        {"id": row, **pair, "llm_output": output}
        for row, (pair, output) in enumerate(zip(PAIRS, expected, strict=True))
    ]
    assert seen == [(0, 8), (3, 8), (6, 8), (8, 8)]
    assert not list(tmp_path.glob("*.part*"))


def test_truncated_outputs_are_reported(
    llm: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(llm, data, tmp_path / "whole.jsonl", DistillSettings(max_new_tokens=4), min_new_tokens=4)
    assert "8 outputs were cut at 4 tokens. Set a higher max_new_tokens." in caplog.text
    caplog.clear()
    end = {"forced_eos_token_id": 1}  # the last of four
    distill(llm, data, tmp_path / "ended.jsonl", DistillSettings(max_new_tokens=4), min_new_tokens=3, **end)
    assert "cut" not in caplog.text


def test_examples_come_from_targets_outputs_or_both(llm: str, data: str, expected: list[str], tmp_path: Path) -> None:
    distill(llm, data, tmp_path / "outputs.jsonl", SETTINGS)
    both = load_examples(tmp_path / "outputs.jsonl", DataSettings(limit=2), ["target", "llm_output"])
    assert both["prompt"][:] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert both["target"][:] == [PAIRS[0]["target"], expected[0], PAIRS[1]["target"], expected[1]]
    one = load_examples(tmp_path / "outputs.jsonl", target_column="llm_output")
    assert one["target"][:] == expected


def test_prompts_come_from_text_files_and_named_columns(llm: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:2], PROMPTS[0]]) + "\n")
    write_pairs(tmp_path / "named.jsonl", [{"source": prompt} for prompt in PROMPTS[:2]])
    distill(llm, tmp_path / "prompts.txt", tmp_path / "a.jsonl", SETTINGS)
    distill(
        llm, tmp_path / "named.jsonl", tmp_path / "b.jsonl", replace(SETTINGS, prompt_column="source", column="target")
    )
    assert [row["llm_output"] for row in rows_of(tmp_path / "a.jsonl")] == [*expected[:2], expected[0]]
    assert rows_of(tmp_path / "b.jsonl")[1] == {"source": PROMPTS[1], "target": expected[1]}


def test_replaced_column_is_reported_and_prompts_are_never_replaced(
    llm: str, data: str, expected: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="Column 'prompt' holds the prompts. Name another one"):
        distill(llm, data, tmp_path / "a.jsonl", replace(SETTINGS, column="prompt"))
    distill(llm, data, tmp_path / "a.jsonl", replace(SETTINGS, column="target"))
    assert rows_of(tmp_path / "a.jsonl")[0]["target"] == expected[0]
    assert "the outputs replace the column 'target'" in caplog.text


@pytest.mark.parametrize("tail", [b"", b'{"prompt": "0f", "ans', '{"prompt": "0f", "target": "ä'.encode()[:-1]])
def test_killed_run_resumes(
    llm: str, data: str, expected: list[str], tmp_path: Path, tail: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[list[int]] = []
    write = TextToText.write

    def stopping(self: TextToText, *args: Any, **kwargs: Any) -> list[list[int]]:
        if len(generated) == 4 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        outputs = write(self, *args, **kwargs)
        generated.extend(outputs)
        return outputs

    monkeypatch.setattr(TextToText, "write", stopping)
    output = tmp_path / "outputs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        distill(llm, data, output, replace(SETTINGS, batch_size=2))
    assert not output.exists()
    with output.with_name("outputs.jsonl.part").open("ab") as part:
        part.write(tail)
    (tmp_path / "again").touch()
    distill(llm, data, output, replace(SETTINGS, batch_size=2))
    assert len(generated) == len(PROMPTS)  # none twice
    assert [row["llm_output"] for row in rows_of(output)] == expected


def test_processes_share_the_prompts(
    llm: str, data: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        assert not (tmp_path / "outputs.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        distill(llm, data, tmp_path / "outputs.jsonl", replace(SETTINGS, batch_size=2))
    assert [row["llm_output"] for row in rows_of(tmp_path / "outputs.jsonl")] == expected


def test_processes_tolerate_prompts_that_were_removed_meanwhile(
    llm: str, data: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    distill(llm, data, tmp_path / "outputs.jsonl", replace(SETTINGS, batch_size=2))  # 4 of 8
    write_pairs(Path(data), PAIRS[1:4])
    for rank in ("0", "1"):
        assert not (tmp_path / "outputs.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        distill(llm, data, tmp_path / "outputs.jsonl", replace(SETTINGS, batch_size=2))
    assert [row["llm_output"] for row in rows_of(tmp_path / "outputs.jsonl")] == expected[1:4]


def test_unfinished_output_of_another_run_is_refused(llm: str, data: str, tmp_path: Path) -> None:
    output = tmp_path / "outputs.jsonl"
    (tmp_path / "outputs.jsonl.part").write_text('{"num_beams": 9}\n')
    with pytest.raises(ValueError, match="belongs to a run with another model, other data or other settings"):
        distill(llm, data, output, SETTINGS)
    distill(llm, data, output, replace(SETTINGS, overwrite=True))
    with pytest.raises(FileExistsError, match="--overwrite"):
        distill(llm, data, output, SETTINGS)
    with pytest.raises(ValueError, match=r"must end in \.jsonl or"):
        distill(llm, data, tmp_path / "outputs.csv", SETTINGS)


def test_llm_that_samples_by_default_is_decoded_without_sampling(
    llm: str, data: str, expected: list[str], tmp_path: Path
) -> None:
    sampling = shutil.copytree(llm, tmp_path / "llm")
    sample_by_default(sampling)
    distill(sampling, data, tmp_path / "outputs.jsonl", SETTINGS)
    assert [row["llm_output"] for row in rows_of(tmp_path / "outputs.jsonl")] == expected


def test_decoder_only_llm_writes_what_it_generates(data: str, tmp_path: Path) -> None:
    llm = write_checkpoint("slm", tmp_path)
    distill(llm, data, tmp_path / "outputs.jsonl", SETTINGS)
    rows = rows_of(tmp_path / "outputs.jsonl")
    text_to_text = TextToText.from_pretrained(llm)
    kwargs = SETTINGS.generate_kwargs()
    assert [row["llm_output"] for row in rows] == text_to_text.generate(PROMPTS, **kwargs)


def test_llm_is_loaded_in_the_dtype_of_the_settings(llm: str, data: str, tmp_path: Path) -> None:
    distill(llm, data, tmp_path / "outputs.jsonl", replace(SETTINGS, dtype="bfloat16"))
    expected = TextToText.from_pretrained(llm, dtype="bfloat16").generate(PROMPTS, **OPTIONS)
    assert [row["llm_output"] for row in rows_of(tmp_path / "outputs.jsonl")] == expected
