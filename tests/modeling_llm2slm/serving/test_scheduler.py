"""The scheduler without HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.scheduler import Batcher, Decoding, Job, Piece, QueueFull
from modeling_llm2slm.settings import ServeSettings
from tests.support.checkpoints import KINDS, PROMPTS, write_checkpoint
from tests.support.serving import wait_until


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

    def test_blank_outputs_are_logged_at_the_first_and_the_tenth(
        self, model: TextToText, caplog: pytest.LogCaptureFixture
    ) -> None:
        batcher = Batcher(model)
        for _ in range(12):
            batcher._warn_of_blank(["", "text"])
        assert [record.getMessage()[:22] for record in caplog.records] == [
            "1 of 2 outputs is blan", "10 of 20 outputs are b"
        ]  # fmt: skip
