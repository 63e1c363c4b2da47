"""The scheduler without HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modeling_llm2slm.inference.continuous import ContinuousTextToText, Generated
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.jobs import Decoding, Job, Piece
from modeling_llm2slm.serving.pace import Pace
from modeling_llm2slm.serving.scheduler import Batcher, ContinuousBatcher, QueueFull, batcher_for
from modeling_llm2slm.settings import ServeSettings
from tests.support.checkpoints import KINDS, PROMPTS, write_checkpoint
from tests.support.serving import OUTPUTS, wait_until


class TestBatcher:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_checkpoint_generates_as_it_does_alone(self, kind: str, tmp_path: Path) -> None:
        model = TextToText.from_pretrained(write_checkpoint(kind, tmp_path))
        limits = [3, 9, 5, 12, 1, 7, 20, 4]
        expected = [
            model.generate([prompt], max_new_tokens=limit)[0] for prompt, limit in zip(PROMPTS, limits, strict=True)
        ]
        found: dict[int, list[Any]] = {row: [] for row in range(len(PROMPTS))}
        jobs = [
            Job(ids, Decoding(limit), found[row].append, stream=row % 2 == 0)
            for row, (ids, limit) in enumerate(zip(model.features(PROMPTS)["input_ids"], limits, strict=True))
        ]
        batcher = Batcher(model)
        batcher.submit(jobs)
        batcher.start()
        wait_until(lambda: batcher.batches == 1)
        assert ["".join(piece.text for piece in found[row]) for row in found] == expected
        assert [found[row][-1].tokens for row in found] == limits
        assert all(found[row][-1].finish_reason == "length" for row in found)
        batcher.stop()
        with pytest.raises(QueueFull):
            batcher.submit(jobs)

    def test_batch_waits_for_more_prompts_only_until_it_is_full(self, model: TextToText, prompts: list[str]) -> None:
        ids = model.features(prompts)["input_ids"]
        batcher = Batcher(model, ServeSettings(max_batch=2, max_wait=30_000))
        batcher.start()
        done: list[Piece | Exception] = []
        batcher.submit([Job(ids[1], Decoding(4), done.append)])
        time.sleep(0.05)
        assert batcher.running == 0
        batcher.submit([Job(ids[1], Decoding(4), done.append)])
        wait_until(lambda: len(done) == 2, seconds=5)
        batcher.stop()

    def test_job_that_would_not_be_finished_in_time_gets_no_place(
        self, model: TextToText, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batcher = Batcher(model, ServeSettings(max_batch=1, timeout=10))
        monkeypatch.setattr(batcher._pace, "seconds", lambda tokens: tokens / 2)
        with batcher.place([50]):  # nothing to wait for
            with pytest.raises(QueueFull, match="need about 26 s") as error, batcher.place([2]):
                pass
            assert error.value.retry_after == 13
        with batcher.place([10]):
            batcher.submit([Job([3], Decoding(10), print)])
        with batcher.place([6]), pytest.raises(QueueFull), batcher.place([1]):
            pass
        with pytest.raises(QueueFull, match="1 prompts are waiting"), batcher.place([1] * 64):
            pass
        assert batcher._entering == []

    def test_pace_follows_the_last_seconds_of_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [0.0]
        monkeypatch.setattr("modeling_llm2slm.serving.pace.time", SimpleNamespace(monotonic=lambda: clock[0]))
        pace = Pace(memory=10)
        assert pace.seconds(100) == 0
        for tokens, passed, expected in ((20, 2, 10), (20, 20, 100), (50, 5, 25)):
            clock[0] += 100  # idle
            pace.start()
            clock[0] += passed
            pace.step(tokens)
            assert pace.seconds(100) == pytest.approx(expected)

    def test_equal_prompts_of_a_batch_are_read_once(
        self, model: TextToText, prompts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[int] = []
        read = type(model).read
        monkeypatch.setattr(
            type(model), "read", lambda self, rows: reads.append(len(rows["input_ids"])) or read(self, rows)
        )
        batcher, found = Batcher(model), [[], [], []]  # type: ignore[var-annotated]
        rows = model.features(prompts)["input_ids"]
        batcher.submit([Job(rows[row], Decoding(50), found[place].append) for place, row in enumerate((1, 2, 1))])
        batcher.start()
        wait_until(lambda: batcher.prompts == 3)
        batcher.stop()
        assert reads == [2]
        assert [pieces[0].text for pieces in found] == [OUTPUTS[1], OUTPUTS[2], OUTPUTS[1]]

    def test_blank_outputs_are_logged_at_the_first_and_the_tenth(
        self, model: TextToText, caplog: pytest.LogCaptureFixture
    ) -> None:
        batcher = Batcher(model)
        for _ in range(12):
            batcher._warn_of_blank(["", "text"])
        assert [record.getMessage()[:22] for record in caplog.records] == [
            "1 of 2 outputs is blan", "10 of 20 outputs are b"
        ]  # fmt: skip


class StepByStep(ContinuousTextToText):
    """A model with continuous batching, whose tokens are those of `generate()`, one for each request and step."""

    def __init__(self, model: TextToText):
        self.inner, self.model, self.tokenizer = model, model.model, model.tokenizer
        self.most = self.added = 0
        self.requests: dict[str, tuple[list[int], int]] = {}
        self.error: Exception | None = None

    def sampling(self, seed: int | None = None, logprobs: int | None = None, **generate_kwargs: Any) -> Any:
        return generate_kwargs

    def add(self, ids: Any, sampling: Any) -> str:
        if ids == [1]:
            raise ValueError("This prompt cannot be read.")
        features = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        (tokens,) = self.inner.write(self.inner.read(features), **sampling)
        self.added += 1
        self.requests[str(self.added)] = (tokens, 0)
        return str(self.added)

    def step(self) -> list[Generated]:
        if self.error is not None:
            raise self.error
        self.most = max(self.most, len(self.requests))
        found = []
        for request, (tokens, done) in self.requests.items():
            self.requests[request] = (tokens, done + 1)
            reason = "stop" if done + 1 == len(tokens) else None
            other = max(tokens) + 1
            logprobs = [
                {token: SimpleNamespace(logprob=-place), other: SimpleNamespace(logprob=-float("inf"))}
                for place, token in enumerate(tokens)
            ]
            found.append(Generated(request, 0, tokens[: done + 1], reason, logprobs))
        return found

    def abort(self, requests: Any) -> None:
        for request in requests:
            del self.requests[request]


class TestContinuousBatcher:
    def submit(self, batcher: Batcher, model: TextToText, limits: list[int]) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {row: [] for row in range(len(limits))}
        rows = model.features(PROMPTS[: len(limits)])["input_ids"]
        batcher.submit(
            [
                Job(ids, Decoding(limit), found[row].append, stream=row % 2 == 0)
                for row, (ids, limit) in enumerate(zip(rows, limits, strict=True))
            ]
        )
        return found

    def test_prompts_join_the_running_batch_and_leave_it_when_they_are_done(self, tmp_path: Path) -> None:
        model = TextToText.from_pretrained(write_checkpoint("llm2slm", tmp_path))
        limits = [3, 9, 5, 12, 1, 7, 20, 4]
        expected = [
            model.generate([prompt], max_new_tokens=limit)[0] for prompt, limit in zip(PROMPTS, limits, strict=True)
        ]
        steps = StepByStep(model)
        batcher: Any = batcher_for(steps, ServeSettings(max_batch=3))  # type: ignore[arg-type]
        assert isinstance(batcher, ContinuousBatcher)
        found = self.submit(batcher, model, limits)
        batcher.start()
        wait_until(lambda: batcher.prompts == len(limits))
        assert ["".join(piece.text for piece in found[row]) for row in found] == expected
        assert [found[row][-1].tokens for row in found] == limits
        assert steps.most == 3
        assert not steps.requests
        assert batcher.tokens == sum(limits)
        batcher.stop()
        with pytest.raises(QueueFull):
            batcher.submit([Job([3], Decoding(3), print)])

    def test_logprobs_are_those_of_the_engine(self, model: TextToText) -> None:
        steps, sent = StepByStep(model), []
        batcher: Any = ContinuousBatcher(steps)
        batcher.submit([Job(model.features(PROMPTS[:1])["input_ids"][0], Decoding(3, logprobs=1), sent.append)])
        batcher.start()
        wait_until(lambda: batcher.prompts == 1)
        batcher.stop()
        assert [token.logprob for token in sent[-1].logprobs] == [0, -1, -2]
        assert [token.top[-1][1] for token in sent[-1].logprobs] == [-9999.0] * 3

    def test_a_prompt_that_fails_does_not_fail_the_others(self, tmp_path: Path) -> None:
        model = TextToText.from_pretrained(write_checkpoint("llm2slm", tmp_path))
        steps, sent = StepByStep(model), []
        batcher: Any = ContinuousBatcher(steps)
        found = self.submit(batcher, model, [3, 4])
        batcher.submit([Job([1], Decoding(3), sent.append)])
        batcher.start()
        wait_until(lambda: batcher.prompts == 2)
        assert [str(error) for error in sent] == ["This prompt cannot be read."]
        assert all(found[row][-1].finish_reason for row in found)
        steps.error = RuntimeError("out of memory")
        found = self.submit(batcher, model, [3, 4])
        wait_until(lambda: batcher.failed == 3)
        assert all(found[row] == [steps.error] for row in found)
        steps.error = None
        found = self.submit(batcher, model, [3, 4])
        wait_until(lambda: batcher.prompts == 4)
        batcher.stop()

    def test_a_cancelled_prompt_leaves_the_batch(self, tmp_path: Path) -> None:
        model = TextToText.from_pretrained(write_checkpoint("llm2slm", tmp_path))
        steps, sent = StepByStep(model), []
        batcher: Any = ContinuousBatcher(steps)
        job = Job(model.features(PROMPTS[:1])["input_ids"][0], Decoding(1000), lambda piece: job.cancel(), stream=True)
        job.decoding = Decoding(20)
        batcher.submit([job, Job(model.features(PROMPTS[1:2])["input_ids"][0], Decoding(6), sent.append)])
        batcher.start()
        wait_until(lambda: batcher.prompts == 1)
        assert sent[-1].finish_reason
        wait_until(lambda: not steps.requests)
        batcher.stop()

    def test_beams_are_refused(self, model: TextToText) -> None:
        with pytest.raises(ValueError, match="num_beams is above 1"):
            ContinuousBatcher(StepByStep(model), ServeSettings(num_beams=2))
