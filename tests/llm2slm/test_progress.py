"""Progress without a terminal: a line at the start, at the end, and regularly between them."""

from __future__ import annotations

import time

import pytest

from llm2slm import progress
from llm2slm.progress import counting, duration, steps


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_start_and_end_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("prompts") as count:
        for done in (0, 10, 1200, 1200):
            count("Encoding", done, 1200)
    assert lines(capsys) == ["Encoding: 0 of 1,200 prompts", "Encoding: 1,200 of 1,200 prompts, 0 s"]


def test_tasks_count_different_things(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("prompts", cut="layers") as count:
        count("distill", 0, 9)
        count("cut", 0, 4)
    assert lines(capsys) == ["distill: 0 of 9 prompts", "cut: 0 of 4 layers"]


def test_a_line_is_printed_after_each_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([*range(0, 10_000, 20)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("threading.Thread.start", lambda self: None)
    monkeypatch.setattr("threading.Thread.join", lambda self: None)
    with counting("prompts") as count:
        for done in range(0, 1001, 100):
            count("Encoding", done, 1000)
    printed = lines(capsys)
    assert printed[0] == "Encoding: 0 of 1,000 prompts"
    assert len(printed) > 4
    assert all("prompts/s" in line and line.endswith("left") for line in printed[1:-1])
    assert printed[-1].startswith("Encoding: 1,000 of 1,000 prompts, ")


def test_a_line_is_printed_while_nothing_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    with counting("prompts") as count:
        count("Encoding", 0, 10)
        count("Encoding", 1, 10)
        time.sleep(0.5)
    printed = lines(capsys)
    assert len(printed) >= 3
    assert printed[-1].startswith("Encoding: 1 of 10 prompts")


def test_a_resumed_run_is_timed_from_its_own_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with counting("prompts") as count:
        count("Encoding", 900, 1000)
        now[0] = 40.0
        count("Encoding", 920, 1000)
    assert lines(capsys)[:2] == [
        "Encoding: 900 of 1,000 prompts",
        "Encoding: 920 of 1,000 prompts, 0.5 prompts/s, 3 min left",
    ]


def test_the_step_and_the_end_of_a_task_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "START_AFTER", 0.1)
    with steps("Planning") as report:
        report("timing the LLM")
        time.sleep(1)
    assert lines(capsys) == ["Planning: timing the LLM (1 s)", "Planning: done in 1 s"]


def test_a_short_task_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with steps("Planning") as report:
        report("timing the LLM")
    assert lines(capsys) == []


def test_only_the_first_of_several_processes_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with counting("prompts") as count, steps("Planning") as report:
        count("Encoding", 0, 10)
        report("x")
    assert lines(capsys) == []


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
