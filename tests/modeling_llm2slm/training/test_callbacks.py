"""Progress of a training whose output is not a terminal."""

from __future__ import annotations

import io
import re
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.training import callbacks
from modeling_llm2slm.training.callbacks import ProgressLines, progress_lines
from modeling_llm2slm.training.recipe import parse_recipe
from modeling_llm2slm.training.run import train


NEEDED = {"model": "m", "train_data": "d.jsonl", "output_dir": "o"}


def test_lines_appear_in_regular_intervals_also_while_nothing_happens() -> None:
    lines: list[str] = []
    with ProgressLines(0.01, lines.append):
        while len(lines) < 3:
            time.sleep(0.001)
    count = len(lines)
    time.sleep(0.05)
    assert len(lines) == count
    assert set(lines) == {"Preparing the model and the data ..."}


def test_line_has_step_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    arguments: Any = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=2)
    state = SimpleNamespace(global_step=10, max_steps=110)
    progress = ProgressLines()
    progress.on_train_begin(arguments, state, None)
    assert progress.line() == "Training: step 10 of 110"
    now[0], state.global_step = 120.0, 20  # ten steps of sixteen examples since the run was resumed
    progress.on_log(arguments, state, None, logs={"loss": 2.34567})
    progress.on_log(arguments, state, None, logs={"eval_loss": 1.0})
    progress.on_step_end(arguments, state, None)
    assert progress.line() == "Training: step 20 of 110, loss 2.346, 8.0 examples/s, 0:03:00 left"
    progress.on_prediction_step(arguments, state, None)
    assert progress.line().startswith("Validating: step 20 of 110")
    progress.on_train_end(arguments, state, None)
    assert progress.line() == "Writing the model ..."


@pytest.mark.parametrize(
    ("terminal", "settings", "expected"),
    [
        (True, {}, False),
        (True, {"disable_tqdm": True}, True),
        (False, {}, True),
        (False, {"disable_tqdm": True}, True),
    ],
)
def test_lines_replace_the_bar_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, settings: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    _, arguments = parse_recipe({**NEEDED, **settings})
    assert (progress_lines(arguments) is not None) == expected


def test_training_prints_lines_and_nothing_else(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    printed, out = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", printed)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (0.01, callbacks._write_line))
    generate = TextToText.generate

    def slowly(self: TextToText, *args: Any, **kwargs: Any) -> list[str]:
        time.sleep(0.05)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TextToText, "generate", slowly)
    train({**recipe, "logging_steps": 1, "disable_tqdm": False})
    lines = [line for line in printed.getvalue().splitlines() if re.match("Training|Validating", line)]
    assert any(
        re.fullmatch(r"\w+: step 2 of 6, loss [\d.]+, [\d.]+ examples/s, 0:\d\d:\d\d left", line) for line in lines
    )
    assert "it/s" not in printed.getvalue()
    assert "loss" not in out.getvalue()
