"""Files of prompts: order, columns, interrupted runs, full disks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from modeling_llm2slm.inference.engine import fingerprint_of
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.inference.outputs import OutputParts
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import GenerateFileSettings
from tests.support.checkpoints import PROMPTS, write_pairs

from .conftest import MAX_NEW_TOKENS, REPEATED, record


SETTINGS = GenerateFileSettings(max_new_tokens=MAX_NEW_TOKENS)
SAMPLING: dict[str, Any] = {"sample": True, "temperature": 2.0, "seed": 4}


def settings(**changes: Any) -> GenerateFileSettings:
    return GenerateFileSettings(**{"max_new_tokens": MAX_NEW_TOKENS, **changes})


def test_outputs_keep_the_order_of_the_prompts(
    composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress: list[tuple[int, int]] = []
    output = prompts.with_name("outputs.txt")
    with record(monkeypatch) as seen:
        report = generate_file(
            composite, prompts, output, settings(batch_size=4, batch_tokens=15),
            progress=lambda *now: progress.append(now),
        )  # fmt: skip
    assert output.read_text().splitlines() == alone
    assert (report.rows, report.duplicates, report.kept) == (11, 3, 0)
    assert report.tokens == sum(seen["written"]) * MAX_NEW_TOKENS
    assert report.tokens_per_second == report.tokens / report.seconds > 0
    assert all(rows * width <= 15 and rows <= 4 for rows, width in seen["read"])
    assert progress[0] == (0, 8)
    assert progress[-1] == (8, 8)
    assert len(progress) == 1 + len(seen["written"])
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["outputs.txt", "prompts.txt"]


def test_an_output_takes_one_line_whatever_it_contains(
    composite: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = OutputParts.keep

    def with_line_ends(self: Any, outputs: Any) -> None:
        keep(self, dict.fromkeys(outputs, "a\rb\r\nc\x0bd\x85e\u2028f\n"))

    monkeypatch.setattr(OutputParts, "keep", with_line_ends)
    output = prompts.with_name("outputs.txt")
    generate_file(composite, prompts, output, SETTINGS)
    assert output.read_bytes().decode().splitlines() == ["a b c d e f "] * len(REPEATED)


class TestColumns:
    def test_rows_keep_their_columns(self, composite: str, alone: list[str], tmp_path: Path) -> None:
        rows = [{"source": prompt, "id": row} for row, prompt in enumerate(REPEATED)]
        data = write_pairs(tmp_path / "rows.jsonl", rows)
        generate_file(composite, data, tmp_path / "outputs.jsonl", settings(prompt_column="source", column="target"))
        found = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
        assert found == [{**row, "target": text} for row, text in zip(rows, alone, strict=True)]

    def test_values_of_json_lines_stay_as_they_are(self, composite: str, tmp_path: Path) -> None:
        rows: list[Any] = [
            {"prompt": PROMPTS[0], "target": "2024-01-01", "x": {"at": "2024-01-01T00:00:00Z"}},
            {"prompt": PROMPTS[1], "target": "\ud83d", "y": 0.1},
        ]
        data, output = write_pairs(tmp_path / "rows.jsonl", rows), tmp_path / "outputs.jsonl"
        for bad in ("", "{\n"):
            with Path(data).open("a") as file:
                file.write(bad)
            generate_file(composite, data, output, settings(skip_bad_rows=True, overwrite=True))
            found = [json.loads(line) for line in output.read_text().splitlines()]
            assert [
                {**row, "model_output": new["model_output"]} for row, new in zip(rows, found, strict=True)
            ] == found

    def test_values_that_json_lacks_become_texts(self, composite: str, tmp_path: Path) -> None:
        row = {"prompt": PROMPTS[0], "at": datetime(2024, 1, 2), "of": [Decimal("1.50")], "raw": b"a"}
        Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
        generate_file(composite, tmp_path / "rows.parquet", tmp_path / "outputs.jsonl", SETTINGS)
        found = json.loads((tmp_path / "outputs.jsonl").read_text())
        assert (found["at"], found["of"], found["raw"]) == ("2024-01-02 00:00:00", ["1.50"], "b'a'")

    def test_the_column_of_the_prompts_is_not_overwritten(self, composite: str, prompts: Path) -> None:
        with pytest.raises(ValueError, match=r"'prompt' holds the prompts.*--column"):
            generate_file(composite, prompts, prompts.with_name("a.jsonl"), settings(column="prompt"))


class TestInterruptedRuns:
    def test_missing_samples_are_those_of_a_whole_run(
        self, composite: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:6] * 3))
        sampling = settings(batch_size=4, **SAMPLING)
        whole, output = prompts.with_name("whole.txt"), prompts.with_name("outputs.txt")
        generate_file(composite, prompts, whole, sampling)
        keep = OutputParts.keep

        def dying(self: Any, outputs: Any) -> None:
            keep(self, outputs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(OutputParts, "keep", dying)
            with pytest.raises(KeyboardInterrupt):
                generate_file(composite, prompts, output, sampling)
        with record(monkeypatch) as seen:
            assert generate_file(composite, prompts, output, sampling).kept == 4
        assert seen["written"] == [4, 4, 4, 2]
        assert output.read_text() == whole.read_text()

    @pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampled"])
    def test_a_run_interrupted_at_any_output_resumes(
        self, composite: str, prompts: Path, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, keep = settings(batch_size=2, **sampling), OutputParts.keep
        generate_file(composite, prompts, prompts.with_name("whole.txt"), run)
        output = prompts.with_name("outputs.txt")
        written = 0
        for torn in (b"", b'{"0f": "half an outp', '{"0f": "ä'.encode()[:-1]):
            left = iter([True, False])

            def dying(self: Any, outputs: Any, left: Iterator[bool] = left) -> None:
                if not next(left):
                    raise KeyboardInterrupt
                keep(self, outputs)

            with monkeypatch.context() as patch, record(monkeypatch) as seen:
                patch.setattr(OutputParts, "keep", dying)
                with pytest.raises(KeyboardInterrupt):
                    generate_file(composite, prompts, output, run)
            written += seen["written"][0]  # the second batch was not stored
            assert not output.exists()
            with output.with_name("outputs.txt.part").open("ab") as part:
                part.write(torn)
        with record(monkeypatch) as seen:
            report = generate_file(composite, prompts, output, run)
        assert report.kept == written == 6
        assert written + sum(seen["written"]) == (11 if sampling else 8)
        assert output.read_bytes() == prompts.with_name("whole.txt").read_bytes()
        assert not list(prompts.parent.glob("*.part*"))

    @pytest.mark.slow
    def test_a_killed_process_resumes(
        self, composite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, TextToText]
    ) -> None:
        many = [f"src{number % 90} src{number // 90}" for number in range(900)]
        (tmp_path / "many.txt").write_text("\n".join(many) + "\n")
        output, part = tmp_path / "outputs.txt", tmp_path / "outputs.txt.part"
        words = [composite, "--file", str(tmp_path / "many.txt"), "--output", str(output), "--batch-size", "1"]
        words += ["--max-new-tokens", "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "llm2slm", "generate", *words],
            cwd=Path(__file__).parents[3], env=environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not (part.exists() and part.stat().st_size > 5000):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not output.exists()
        _, *lines = part.read_text().splitlines(keepends=True)
        finished = sum(len(json.loads(line)) for line in lines if line.endswith("\n"))
        assert 0 < finished < 900
        with record(monkeypatch) as seen:
            generate_file(composite, tmp_path / "many.txt", output, settings(batch_size=64, max_new_tokens=3))
        assert sum(seen["written"]) == 900 - finished
        expected = models["llm2slm"].generate(many, 64, max_new_tokens=3)
        assert output.read_text().splitlines() == expected
        assert not part.exists()

    def test_outputs_of_another_run_are_not_mixed_in(
        self, composite: str, checkpoints: dict[str, str], prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, part = prompts.with_name("outputs.txt"), prompts.with_name("outputs.txt.part")

        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("modeling_llm2slm.inference.files.atomic_write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generate_file(composite, prompts, output, SETTINGS)
        left = part.read_bytes()
        others = [settings(max_new_tokens=4), settings(dtype="bfloat16")]
        for model, other in (*((composite, other) for other in others), (checkpoints["llm"], SETTINGS)):
            with pytest.raises(ValueError, match="belongs to a run with another model, other data or other settings"):
                generate_file(model, prompts, output, other)
        assert part.read_bytes() == left
        with record(monkeypatch) as seen:
            generate_file(composite, prompts, output, settings(overwrite=True, max_new_tokens=4))
        assert sum(seen["written"]) == 8
        assert not part.exists()

    def test_data_that_changed_since_the_interruption_gets_its_own_outputs(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = prompts.read_text().splitlines()
        prompts.write_text("\n".join(lines[:3]) + "\n")

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("modeling_llm2slm.inference.files.atomic_write", full)
            with pytest.raises(OSError, match=r"outputs.txt cannot be written: No space left .* All outputs are kept"):
                generate_file(composite, prompts, prompts.with_name("outputs.txt"), SETTINGS)
        prompts.write_text("\n".join(reversed(lines)) + "\n")
        report = generate_file(composite, prompts, prompts.with_name("outputs.txt"), SETTINGS)
        assert report.kept == 2
        assert prompts.with_name("outputs.txt").read_text().splitlines() == alone[::-1]

    def test_weights_and_configs_identify_a_checkpoint(self, composite: str, tmp_path: Path) -> None:
        TextToText.from_pretrained(composite).save_pretrained(tmp_path)
        before = fingerprint_of(tmp_path)
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "model.safetensors").touch()
        (tmp_path / "notes.md").touch()
        assert fingerprint_of(tmp_path) == before
        for name in ("generation_config.json", "model.safetensors"):
            with (tmp_path / name).open("ab") as file:
                file.write(b" ")
            assert fingerprint_of(tmp_path) != before
            before = fingerprint_of(tmp_path)


class TestDisks:
    @pytest.mark.parametrize("place", ["file.txt/outputs.txt", "folder", "/proc/outputs.txt"])
    def test_an_output_that_cannot_be_written_is_an_error_before_any_compute(
        self, prompts: Path, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (prompts.parent / "file.txt").touch()
        (prompts.parent / "folder").mkdir()
        monkeypatch.setattr(TextToText, "from_pretrained", None)
        with pytest.raises(
            OSError, match=r"cannot be written: .*\. Choose another output, or free some disk space\."
        ) as caught:
            generate_file("no/model", prompts, prompts.parent / place, SETTINGS)
        assert "\n" not in str(caught.value)

    def test_a_full_disk_loses_no_finished_output(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, run = prompts.with_name("outputs.txt"), settings(batch_size=1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        keep, kept = OutputParts.keep, []

        def filling(self: Any, outputs: Any) -> None:
            if len(kept) == 3:  # space for half a line
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 20, hard))
            try:
                keep(self, outputs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            kept.append(outputs)

        monkeypatch.setattr(OutputParts, "keep", filling)
        with pytest.raises(OSError, match=r"part cannot be written: File too large\. Earlier outputs are kept"):
            generate_file(composite, prompts, output, run)
        assert not output.exists()
        monkeypatch.setattr(OutputParts, "keep", keep)
        assert generate_file(composite, prompts, output, run).kept == 3
        assert output.read_text().splitlines() == alone

    def test_a_run_that_generates_nothing_leaves_nothing(self, composite: str, prompts: Path) -> None:
        output = prompts.with_name("new") / "outputs.txt"
        with pytest.raises(ValueError, match="64 positions"):
            generate_file(composite, prompts, output, settings(max_new_tokens=500))
        with pytest.raises(ValueError, match="nonsense"):
            generate_file(composite, prompts, output, nonsense=3)
        assert list(prompts.parent.iterdir()) == [prompts]
