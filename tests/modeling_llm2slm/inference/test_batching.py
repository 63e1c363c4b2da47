"""Many prompts: order, duplicates, batches of tokens, reading ahead, and files that survive what stops the work."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import llm2slm
from modeling_llm2slm import throughput
from modeling_llm2slm.inference.batching import BatchLimits, PromptTable, answer, one_ahead
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.fingerprints import checkpoint_fingerprint
from tests.support.checkpoints import KINDS, PROMPTS, write_checkpoint, write_pairs
from tests.support.common import count_calls


OPTIONS = {"max_new_tokens": 5}
REPEATED = [PROMPTS[0], *PROMPTS, PROMPTS[0], PROMPTS[3]]  # 8 different ones in 11 rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_checkpoint(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, str]) -> dict[str, TextToText]:
    return {kind: TextToText.from_pretrained(path) for kind, path in checkpoints.items()}


@pytest.fixture(scope="module")
def composite(checkpoints: dict[str, str]) -> str:
    return checkpoints["llm2slm"]


@pytest.fixture(scope="module")
def alone(models: dict[str, TextToText]) -> list[str]:
    """The answer to each of `REPEATED`, written alone."""
    return [models["llm2slm"].generate([prompt], **OPTIONS)[0] for prompt in REPEATED]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in REPEATED))
    return path


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(llm2slm, "out", llm2slm.Console(width=200))
    monkeypatch.setattr(llm2slm, "err", llm2slm.Console(stderr=True, width=200))


@contextmanager
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """The shapes `(B, N)` of what is read, and the numbers of answers that are written at once."""
    seen: dict[str, list[Any]] = {"read": [], "written": [], "threads": []}
    read, write = TextToText.read, TextToText.write

    def recording_read(self: TextToText, features: Any) -> Any:
        inputs = read(self, features)
        seen["read"].append(tuple(inputs["input_ids"].shape))
        seen["threads"].append(threading.current_thread() is threading.main_thread())
        return inputs

    def recording_write(self: TextToText, inputs: Any, **kwargs: Any) -> Any:
        answers = write(self, inputs, **kwargs)
        seen["written"].append(len(answers))
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(TextToText, "read", recording_read)
        patch.setattr(TextToText, "write", recording_write)
        yield seen


def generate(*words: Any) -> Any:
    """Runs `llm2slm generate` and returns its exit status."""
    with pytest.raises(SystemExit) as stop:
        llm2slm.main(["generate", *map(str, words)])
    return stop.value.code


class TestBatches:
    def test_tokens_rows_and_padding_limit_a_batch(self) -> None:
        lengths = [9, 9, 5, 4, 4, 1, 1, 1, 1, 1]
        cut = [list(batch) for batch in BatchLimits(4, 18).cut(lengths, lambda length: length)]
        assert cut == [[9, 9], [5, 4, 4], [1, 1, 1, 1], [1]]
        assert all(batch[0] * len(batch) <= 18 for batch in cut)
        assert [list(batch) for batch in BatchLimits(4, 3).cut([9, 2], lambda length: length)] == [[9], [2]]
        assert [len(batch) for batch in BatchLimits(4).cut(lengths, lambda length: length)] == [4, 4, 2]

    def test_what_is_left_of_a_run_is_batched_as_it_would_have_been(self) -> None:
        table = PromptTable(sampled=True)
        table.add(["a", "b", "a", "c", "d", "e", "a"], lambda new: [3, 5, 2, 2, 9][: len(new)])
        whole = table.batches(BatchLimits(2, 10))
        assert whole == [[(4, 0)], [(1, 0), (0, 0), (0, 1), (0, 2)], [(2, 0), (3, 0)]]
        known = {table.key(draw) for batch in whole[:1] for draw in batch}
        assert table.batches(BatchLimits(2, 10), known) == whole[1:]
        shares = [table.batches(BatchLimits(2, 10), (), rank, 2) for rank in (0, 1)]
        assert shares == [whole[0::2], whole[1::2]]

    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_prompts_are_answered_once(
        self, models: dict[str, TextToText], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = [models[kind].generate([prompt], **OPTIONS)[0] for prompt in REPEATED]
        with record(monkeypatch) as seen:
            assert models[kind].generate(REPEATED, 3, **OPTIONS) == expected
        assert seen["written"] == [3, 3, 2]

    def test_samples_of_equal_prompts_are_drawn_apart_and_the_prompt_is_read_once(
        self, models: dict[str, TextToText], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = models["llm2slm"]
        torch.manual_seed(0)
        with record(monkeypatch) as seen, count_calls(model.model.encoder.llm) as calls:
            answers = model.generate([PROMPTS[0]] * 20, 8, do_sample=True, temperature=3.0, **OPTIONS)
        assert len(set(answers)) > 10
        assert len(calls) == 1
        assert [shape[0] for shape in seen["read"]] == [1]
        assert seen["written"] == [8, 8, 4]

    def test_a_batch_that_samples_draws_from_the_right_prompt(self, models: dict[str, TextToText]) -> None:
        prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[4], PROMPTS[0]]
        for kind in KINDS:
            greedy = models[kind].generate(prompts, 3, **OPTIONS)
            assert models[kind].generate(prompts, 3, do_sample=True, top_k=1, **OPTIONS) == greedy


class TestReadingAhead:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_changes_no_answer(
        self, models: dict[str, TextToText], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, results = models[kind], []
        for overlap in (False, True):
            with record(monkeypatch) as seen:
                results.append(self.answers(model, overlap, do_sample=True, temperature=2.0, seed=3))
            assert seen["threads"] == [not overlap] * 4
        assert results[0] == results[1]

    @staticmethod
    def answers(model: TextToText, overlap: bool, seed: int, **options: Any) -> dict[Any, list[int]]:
        features, limits = model.features(REPEATED), BatchLimits(2)
        table = PromptTable(sampled=True)
        table.add(REPEATED, lambda new: [len(features["input_ids"][row]) for row in new])

        def of_rows(rows: list[int]) -> dict[str, list[list[int]]]:
            return {name: [values[row] for row in rows] for name, values in features.items()}

        answers: dict[Any, list[int]] = {}
        batches = table.batches(limits)
        for draws, ids in answer(model, table, batches, of_rows, limits, overlap, seed, **OPTIONS, **options):
            answers.update(zip(draws, ids, strict=True))
        return answers

    def test_one_batch_is_read_ahead_and_no_more(self) -> None:
        begun: list[int] = []
        for item in one_ahead(lambda item: begun.append(item) or item, range(6), overlap=True):
            time.sleep(0.01)
            assert begun == list(range(min(item + 2, 6)))

    def test_an_error_while_reading_reaches_the_caller(self) -> None:
        with pytest.raises(ZeroDivisionError):
            list(one_ahead(lambda item: 1 // item, [2, 1, 0, 1], overlap=True))

    def test_it_is_done_where_a_core_is_free(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = prompts.with_name("answers.txt")
        for cores, threads in ((1, [True] * 4), (torch.get_num_threads() + 1, [False] * 4)):
            monkeypatch.setattr(throughput, "_cores", lambda cores=cores: cores)
            with record(monkeypatch) as seen:
                generate_file(composite, prompts, output, limits=BatchLimits(2), **OPTIONS)
            assert seen["threads"] == threads
            assert output.read_text().splitlines() == alone


class TestFiles:
    def test_answers_keep_the_order_of_the_prompts(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        progress: list[tuple[int, int]] = []
        with record(monkeypatch) as seen:
            report = generate_file(
                composite, prompts, prompts.with_name("answers.txt"), limits=BatchLimits(4, 15),
                progress=lambda *now: progress.append(now), **OPTIONS,
            )  # fmt: skip
        assert prompts.with_name("answers.txt").read_text().splitlines() == alone
        assert (report.rows, report.duplicates, report.kept) == (11, 3, 0)
        assert report.tokens == sum(seen["written"]) * 5
        assert report.tokens_per_second == report.tokens / report.seconds > 0
        assert all(rows * width <= 15 and rows <= 4 for rows, width in seen["read"])
        assert progress[0] == (0, 8)
        assert progress[-1] == (8, 8)
        assert len(progress) == 1 + len(seen["written"])
        assert sorted(path.name for path in prompts.parent.iterdir()) == ["answers.txt", "prompts.txt"]

    def test_an_answer_is_one_line_whatever_it_holds(
        self, composite: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep = throughput.OutputParts.keep

        def with_line_ends(self: Any, answers: Any) -> None:
            keep(self, dict.fromkeys(answers, "a\rb\r\nc\x0bd\x85e\u2028f\n"))

        monkeypatch.setattr(throughput.OutputParts, "keep", with_line_ends)
        output = prompts.with_name("answers.txt")
        generate_file(composite, prompts, output, **OPTIONS)
        assert output.read_bytes().decode().splitlines() == ["a b c d e f "] * len(REPEATED)

    def test_rows_keep_their_columns(self, composite: str, alone: list[str], tmp_path: Path) -> None:
        rows = [{"source": prompt, "id": row} for row, prompt in enumerate(REPEATED)]
        data = write_pairs(tmp_path / "rows.jsonl", rows)
        generate_file(composite, data, tmp_path / "answers.jsonl", "source", column="target", **OPTIONS)
        found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert found == [{**row, "target": text} for row, text in zip(rows, alone, strict=True)]

    def test_columns_come_out_as_they_came_in(self, composite: str, tmp_path: Path) -> None:
        rows: list[Any] = [
            {"prompt": PROMPTS[0], "target": "2024-01-01", "x": {"at": "2024-01-01T00:00:00Z"}},
            {"prompt": PROMPTS[1], "target": "\ud83d", "y": 0.1},
        ]
        data, output = write_pairs(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
        for bad in ("", "{\n"):
            with Path(data).open("a") as file:
                file.write(bad)
            generate_file(composite, data, output, skip_bad_rows=True, **OPTIONS)
            found = [json.loads(line) for line in output.read_text().splitlines()]
            assert [
                {**row, "model_output": new["model_output"]} for row, new in zip(rows, found, strict=True)
            ] == found

    def test_values_that_json_does_not_have_become_texts(self, composite: str, tmp_path: Path) -> None:
        row = {"prompt": PROMPTS[0], "at": datetime(2024, 1, 2), "of": [Decimal("1.50")], "raw": b"a"}
        Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
        generate_file(composite, tmp_path / "rows.parquet", tmp_path / "answers.jsonl", **OPTIONS)
        found = json.loads((tmp_path / "answers.jsonl").read_text())
        assert (found["at"], found["of"], found["raw"]) == ("2024-01-02 00:00:00", ["1.50"], "b'a'")

    def test_draws_that_are_left_are_drawn_as_they_would_have_been(
        self, composite: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:6] * 3))
        options: Any = {"limits": BatchLimits(4), "do_sample": True, "temperature": 2.0, "seed": 4, **OPTIONS}
        whole, output = prompts.with_name("whole.txt"), prompts.with_name("answers.txt")
        generate_file(composite, prompts, whole, **options)
        keep = throughput.OutputParts.keep

        def dying(self: Any, answers: Any) -> None:
            keep(self, answers)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(throughput.OutputParts, "keep", dying)
            with pytest.raises(KeyboardInterrupt):
                generate_file(composite, prompts, output, **options)
        with record(monkeypatch) as seen:
            assert generate_file(composite, prompts, output, **options).kept == 4
        assert seen["written"] == [4, 4, 4, 2]
        assert output.read_text() == whole.read_text()

    @pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0, "seed": 4}])
    def test_a_run_killed_at_any_answer_goes_on_with_what_is_missing(
        self, composite: str, prompts: Path, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options, keep = {"limits": BatchLimits(2), **OPTIONS, **sampling}, throughput.OutputParts.keep
        generate_file(composite, prompts, prompts.with_name("whole.txt"), **options)
        output = prompts.with_name("answers.txt")
        written = 0
        for torn in (b"", b'{"0f": "half an answ', '{"0f": "ä'.encode()[:-1]):
            left = iter([True, False])

            def dying(self: Any, answers: Any, left: Iterator[bool] = left) -> None:
                if not next(left):
                    raise KeyboardInterrupt
                keep(self, answers)

            with monkeypatch.context() as patch, record(monkeypatch) as seen:
                patch.setattr(throughput.OutputParts, "keep", dying)
                with pytest.raises(KeyboardInterrupt):
                    generate_file(composite, prompts, output, **options)
            written += seen["written"][0]  # the second was not finished
            assert not output.exists()
            with output.with_name("answers.txt.part").open("ab") as part:
                part.write(torn)
        with record(monkeypatch) as seen:
            report = generate_file(composite, prompts, output, **options)
        assert report.kept == written == 6
        assert written + sum(seen["written"]) == (11 if sampling else 8)
        assert output.read_bytes() == prompts.with_name("whole.txt").read_bytes()
        assert not list(prompts.parent.glob("*.part*"))

    @pytest.mark.slow
    def test_a_killed_process_goes_on(
        self, composite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, TextToText]
    ) -> None:
        many = [f"src{number % 90} src{number // 90}" for number in range(900)]
        (tmp_path / "many.txt").write_text("\n".join(many) + "\n")
        output, part = tmp_path / "answers.txt", tmp_path / "answers.txt.part"
        words = [composite, "--file", str(tmp_path / "many.txt"), "--output", str(output), "--batch-size", "1"]
        words += ["--max-new-tokens", "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "llm2slm", "generate", *words],
            cwd=Path(__file__).parents[1], env=environment, stderr=subprocess.DEVNULL,
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
            assert generate(*words[:5], "--batch-size", 64, "--max-new-tokens", 3) == 0
        assert sum(seen["written"]) == 900 - finished
        expected = models["llm2slm"].generate(many, 64, max_new_tokens=3)
        assert output.read_text().splitlines() == expected
        assert not part.exists()

    def test_what_another_run_left_is_not_mixed_in(
        self, composite: str, checkpoints: dict[str, str], prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, part = prompts.with_name("answers.txt"), prompts.with_name("answers.txt.part")

        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("modeling_llm2slm.inference.files._write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generate_file(composite, prompts, output, **OPTIONS)
        left = part.read_bytes()
        for model, options in ((composite, {"max_new_tokens": 4}), (checkpoints["llm"], OPTIONS)):
            with pytest.raises(ValueError, match="left by a run with another model, other data or other settings"):
                generate_file(model, prompts, output, **options)
        assert part.read_bytes() == left
        with record(monkeypatch) as seen:
            generate_file(composite, prompts, output, overwrite=True, max_new_tokens=4)
        assert sum(seen["written"]) == 8
        assert not part.exists()

    def test_data_that_has_changed_since_gets_its_own_answers(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = prompts.read_text().splitlines()
        prompts.write_text("\n".join(lines[:3]) + "\n")

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("modeling_llm2slm.inference.files._write", full)
            with pytest.raises(OSError, match=r"answers.txt cannot be written: No space left .* All answers are kept"):
                generate_file(composite, prompts, prompts.with_name("answers.txt"), **OPTIONS)
        prompts.write_text("\n".join(reversed(lines)) + "\n")
        report = generate_file(composite, prompts, prompts.with_name("answers.txt"), **OPTIONS)
        assert report.kept == 2
        assert prompts.with_name("answers.txt").read_text().splitlines() == alone[::-1]

    def test_a_checkpoint_is_known_by_weights_and_configs(self, composite: str, tmp_path: Path) -> None:
        TextToText.from_pretrained(composite).save_pretrained(tmp_path)
        before = checkpoint_fingerprint(tmp_path)
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "model.safetensors").touch()
        (tmp_path / "notes.md").touch()
        assert checkpoint_fingerprint(tmp_path) == before
        (tmp_path / "decoder.onnx.data").touch()
        for name in ("generation_config.json", "model.safetensors", "decoder.onnx.data"):
            with (tmp_path / name).open("ab") as file:
                file.write(b" ")
            assert checkpoint_fingerprint(tmp_path) != before
            before = checkpoint_fingerprint(tmp_path)

    @pytest.mark.parametrize("place", ["file.txt/answers.txt", "folder", "/proc/answers.txt"])
    def test_a_place_that_cannot_be_written_to_is_an_error_before_any_compute(
        self, prompts: Path, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (prompts.parent / "file.txt").touch()
        (prompts.parent / "folder").mkdir()
        monkeypatch.setattr(TextToText, "from_pretrained", None)
        with pytest.raises(OSError, match=r"cannot be written: .*\. Choose another output, or make room\.") as caught:
            generate_file("no/model", prompts, prompts.parent / place, **OPTIONS)
        assert "\n" not in str(caught.value)

    def test_a_disk_that_fills_up_costs_nothing_that_was_finished(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = prompts.with_name("answers.txt")
        options = {"limits": BatchLimits(1), **OPTIONS}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        keep, kept = throughput.OutputParts.keep, []

        def filling(self: Any, answers: Any) -> None:
            if len(kept) == 3:  # room for half a line
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 20, hard))
            try:
                keep(self, answers)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            kept.append(answers)

        monkeypatch.setattr(throughput.OutputParts, "keep", filling)
        with pytest.raises(OSError, match=r"part cannot be written: File too large\. Answers before it are kept"):
            generate_file(composite, prompts, output, **options)
        assert not output.exists()
        monkeypatch.setattr(throughput.OutputParts, "keep", keep)
        assert generate_file(composite, prompts, output, **options).kept == 3
        assert output.read_text().splitlines() == alone

    def test_what_another_process_has_removed_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = throughput.OutputParts(tmp_path / "answers.txt", {})
        monkeypatch.setattr(parts, "_paths", lambda: [tmp_path / "answers.txt.part"])
        parts.remove()

    def test_a_run_that_answers_nothing_leaves_nothing(self, composite: str, prompts: Path) -> None:
        output = prompts.with_name("new") / "answers.txt"
        with pytest.raises(ValueError, match="64 positions"):
            generate_file(composite, prompts, output, max_new_tokens=500)
        with pytest.raises(ValueError, match="nonsense"):
            generate_file(composite, prompts, output, nonsense=3)
        assert list(prompts.parent.iterdir()) == [prompts]


class TestCommand:
    def test_files_of_every_kind(self, composite: str, prompts: Path, alone: list[str], capsys: Any) -> None:
        folder = prompts.parent
        data = write_pairs(folder / "rows.jsonl", [{"source": prompt} for prompt in REPEATED])
        (folder / "prompts.en").write_text(prompts.read_text())
        words = ["--max-new-tokens", "5", "--batch-tokens", "20"]
        for file, output, more in (
            (prompts, "a.txt", []),
            (folder / "prompts.en", "b.de", []),
            (data, "c.jsonl", ["--prompt-column", "source", "--column", "mt"]),
        ):
            assert generate(composite, "--file", file, "--output", folder / output, *words, *more) == 0
            printed = " ".join(capsys.readouterr().out.split())
            assert f"11 answers are in {folder / output}: 3 prompts occurred before, 0 answers were there" in printed
            assert "40 tokens were written" in printed
            assert "tokens/s" in printed
        assert (folder / "a.txt").read_text().splitlines() == alone
        assert (folder / "b.de").read_text().splitlines() == alone
        assert [json.loads(line)["mt"] for line in (folder / "c.jsonl").read_text().splitlines()] == alone
        assert generate(composite, "--file", data, "--prompt-column", "source", *words[:2]) == 0
        assert capsys.readouterr().out.splitlines() == alone

    def test_samples_of_a_seed_are_repeated(self, composite: str, prompts: Path) -> None:
        texts = []
        for seed in ("1", "1", "2"):
            output = prompts.with_name(f"{len(texts)}.txt")
            words = ["--sample", "--temperature", "2", "--seed", seed, "--max-new-tokens", "5"]
            assert generate(composite, "--file", prompts, "--output", output, *words) == 0
            texts.append(output.read_text())
        assert texts[0] == texts[1] != texts[2]
        assert Counter(texts[0].splitlines())[texts[0].splitlines()[0]] < 3

    def test_tokens_belong_to_files(self, composite: str, capsys: Any) -> None:
        assert generate(composite, "src1", "--batch-tokens", 10) == 2
        assert "--batch-tokens" in capsys.readouterr().err
