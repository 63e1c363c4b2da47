"""Outputs, times and their factor as HTML."""

from __future__ import annotations

import re
from collections.abc import Callable

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.playground.comparison import LLM, LLM2SLM, Comparison, Progress
from modeling_llm2slm.serving.playground.html import outputs_html, seconds_text, verdict_html
from modeling_llm2slm.serving.playground.llm import ComparedLLM


def finished(seconds: float, tokens: int = 10, text: str = "Hallo") -> Progress:
    stages = {"LLM encoding": 0.25 * seconds, "projection": 0.05 * seconds, "decoding": 0.7 * seconds}
    return Progress(text, tokens, seconds, stages, finished=True)


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_verdict_names_the_factor() -> None:
    verdict = words(verdict_html({LLM2SLM: finished(0.5), LLM: finished(2)}))
    assert verdict == "4.0× faster than the LLM on this prompt."
    assert "2.0× slower" in words(verdict_html({LLM2SLM: finished(2), LLM: finished(1)}))
    assert "differ in length" in verdict_html({LLM2SLM: finished(0.5, tokens=2), LLM: finished(2)})
    assert words(verdict_html({LLM2SLM: finished(0.5)})) == "LLM-to-SLM took 500 ms."
    assert words(verdict_html({LLM2SLM: Progress(tokens=1)}, running=True)) == "LLM-to-SLM is generating …"
    assert words(verdict_html({LLM2SLM: finished(1), LLM: Progress()}, running=True)) == "LLM is generating …"
    assert words(verdict_html({LLM2SLM: Progress(error="No.")})) == ""


def test_outputs_show_text_times_and_shares(
    compare: Callable[..., Comparison], load: Callable[[str], TextToText]
) -> None:
    comparison = compare(ComparedLLM(load("llm")))
    html = outputs_html(comparison, {LLM2SLM: finished(0.5, text="<b>fett</b>"), LLM: finished(2)})
    assert "&lt;b&gt;fett&lt;/b&gt;" in html
    shown = words(html)
    assert "time 500 ms tokens 10 tokens/s 20" in shown
    assert "LLM encoding 25 % projection 5 % decoding 70 %" in shown
    assert "width:25.00%" in html
    assert "width:100.00%" in html
    waiting = words(outputs_html(comparison, {LLM2SLM: Progress("Ein", 1, 0.1)}, running=True))
    assert "Waits for its turn." in waiting
    assert "Time by stage" not in waiting


def test_the_reason_of_a_missing_llm_is_shown(compare: Callable[..., Comparison]) -> None:
    html = outputs_html(compare(ComparedLLM(reason="Only LLM-to-SLM is shown: <no>.")), {})
    assert "Only LLM-to-SLM is shown: &lt;no&gt;." in html


def test_times_have_units() -> None:
    assert [seconds_text(seconds) for seconds in (0.0042, 0.9, 12.345)] == ["4 ms", "900 ms", "12.35 s"]
