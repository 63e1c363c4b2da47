"""The timing harness: contestants take turns, and times belong to the right outputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from modeling_llm2slm.evaluation import timing
from modeling_llm2slm.evaluation.timing import Timing, median_timing, speed, time_in_turns, time_output, time_tokens
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import PROMPTS, write_checkpoint


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> TextToText:
    return TextToText.from_pretrained(write_checkpoint("slm", tmp_path_factory.mktemp("slm")))


def set_clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    clock: Iterator[float] = iter(seconds)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))


def test_contestants_are_warmed_up_and_each_starts_a_round() -> None:
    calls: list[tuple[str, int]] = []
    steps: list[tuple[int, str]] = []
    contestants = {name: lambda number, name=name: calls.append((name, number)) or number for name in "abc"}
    results = time_in_turns(contestants, [1, 2, 3], warm_up=9, progress=lambda *step: steps.append(step))
    assert calls[:3] == [("a", 9), ("b", 9), ("c", 9)]
    assert [name for name, _ in calls[3:]] == list("abcbcacab")
    assert results == {name: [1, 2, 3] for name in "abc"}
    assert steps[2:4] == [(0, "c"), (1, "a")]


def test_without_rounds_nothing_is_called() -> None:
    assert time_in_turns({"a": lambda argument: pytest.fail("called")}, []) == {"a": []}


def test_times_are_divided_by_outputs_and_by_tokens(slm: TextToText, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0, 100, 0, 1, 10, 12)  # the first pair is the warm-up
    contestants = {"slm": partial(time_output, slm, min_new_tokens=4, max_new_tokens=4)}
    timings = time_in_turns(contestants, ["src1", "src2 src3"])["slm"]
    assert speed(timings) == {"ms_per_output": 1500, "ms_per_token": 375, "tokens_per_output": 4, "timed_outputs": 2}


def test_each_model_gets_its_own_times(slm: TextToText, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0, 0, 0, 0, 0, 1, 1, 3, 3, 6, 6, 10)  # warm-up twice, then a, b, b, a
    contestants = {name: partial(time_output, slm, max_new_tokens=2, min_new_tokens=2) for name in "ab"}
    speeds = {name: speed(timings) for name, timings in time_in_turns(contestants, PROMPTS[:2]).items()}
    assert [speeds[name]["ms_per_output"] for name in "ab"] == [2500, 2500]
    assert speeds["a"]["ms_per_token"] == 1250


def test_the_first_token_and_later_ones_are_timed(slm: TextToText, monkeypatch: pytest.MonkeyPatch) -> None:
    model = slm.model
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    set_clock(monkeypatch, 0, 5, 6, 8, 11, 12)  # start, four tokens, end
    ids = torch.tensor([[3, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert time_tokens(model, inputs, 4, pad_token_id=0) == Timing(total=12, tokens=4, first=5, per_token=2)


def test_repetitions_have_medians() -> None:
    timings = [Timing(3, 8, 1, 0.5), Timing(1, 8, 2, 0.1), Timing(2, 8, 9, 0.2)]
    assert median_timing(timings) == Timing(2, 8, 2, 0.2)
    assert median_timing([Timing(3, 8)]) == Timing(3, 8)
