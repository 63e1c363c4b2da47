"""Outputs, times and their factor as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ...inference.text_to_text import TextToText
from .comparison import LLM, LLM2SLM, Comparison, Progress


WAITING = Progress()


def outputs_html(comparison: Comparison, outputs: Mapping[str, Progress], running: bool = False) -> str:
    """
    Return the models side by side, and the time of each by stage.

    Args:
        comparison: The models.
        outputs: Their outputs so far.
        running: Whether more is to come.
    """
    cards = [
        _card(name, description_of(one.text_to_text), outputs.get(name), running)
        for name, one in comparison.contestants.items()
    ]
    if comparison.reason:
        cards.append(f'<section class="card missing"><h2>{LLM}</h2><p>{escape(comparison.reason)}</p></section>')
    return f'<div class="cards">{"".join(cards)}</div>{_times(outputs)}'


def verdict_html(outputs: Mapping[str, Progress], running: bool = False) -> str:
    """Return how many times faster the LLM-to-SLM model was, as a sentence that starts with the factor."""
    ours, llm = outputs.get(LLM2SLM, WAITING), outputs.get(LLM, WAITING)
    if running:
        name = LLM if ours.finished or ours.error else LLM2SLM
        return f"<p>{name} is generating …</p>"
    if ours.finished and llm.finished:
        times = llm.seconds / ours.seconds
        factor, word = (times, "faster") if times >= 1 else (1 / times, "slower")
        short, long = sorted((ours.tokens, llm.tokens))
        caution = " The outputs differ in length: compare tokens/s." if long > 2 * short else ""
        return f"<p><strong>{factor:.1f}×</strong> {word} than the LLM on this prompt.{caution}</p>"
    if ours.finished:
        return f"<p>LLM-to-SLM took {seconds_text(ours.seconds)}.</p>"
    return "<p></p>"


def description_of(text_to_text: TextToText) -> str:
    """Return the size of a model in words."""
    parts, decode = text_to_text.parts(), text_to_text.parameters()["decode"]
    total = sum(part.parameters for part in parts)
    sizes = f"{_number(decode)} of {_number(total)} parameters decode"
    return f"{sizes}, {parts[-1].dtype}"


def seconds_text(seconds: float) -> str:
    """Return a time with its unit."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _card(name: str, description: str, output: Progress | None, running: bool) -> str:
    output = output or WAITING
    is_writing = running and output is not WAITING and not output.finished and not output.error
    hint = "Waits for its turn." if running else "Its text appears here."
    text = escape(output.text) or ("" if is_writing else f'<span class="empty">{hint}</span>')
    if output.error:
        text = f'<span class="error">{escape(output.error)}</span>'
    elif output.finished and not output.text:
        text = '<span class="empty">The output is empty.</span>'
    caret = '<span class="caret" aria-hidden="true"></span>' if is_writing else ""
    known = output.tokens > 0
    facts = {
        "time": seconds_text(output.seconds) if output.seconds else "–",
        "tokens": str(output.tokens) if known else "–",
        "tokens/s": _speed(output.tokens_per_second) if known else "–",
    }
    kind = "ours" if name == LLM2SLM else "llm"
    rows = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items())
    return (
        f'<section class="card {kind}" aria-label="{name}"><h2>{name}</h2><p class="size">{escape(description)}</p>'
        f'<p class="text" dir="auto">{text}{caret}</p><dl>{rows}</dl></section>'
    )


def _times(outputs: Mapping[str, Progress]) -> str:
    """Return a bar for each finished output, as long as its time, with a part for each stage."""
    finished = {name: output for name, output in outputs.items() if output.finished}
    if not finished:
        return ""
    longest = max(output.seconds for output in finished.values())
    rows = "".join(_bar(name, output, longest) for name, output in finished.items())
    return f'<section class="times" aria-label="Time by stage"><h2>Time by stage</h2>{rows}</section>'


def _bar(name: str, output: Progress, longest: float) -> str:
    shares = {stage: seconds / output.seconds for stage, seconds in output.stages.items()}
    parts = "".join(
        f'<span class="{_kind(stage)}" style="flex-grow:{share:.4f}"></span>' for stage, share in shares.items()
    )
    words = "".join(
        f'<li><span class="key {_kind(stage)}" aria-hidden="true"></span>{stage} {_percent(share)}</li>'
        for stage, share in shares.items()
    )
    width = max(100 * output.seconds / longest, 0.5)
    return (
        f'<div class="bar-row"><h3>{name} <span>{seconds_text(output.seconds)}</span></h3>'
        f'<div class="bar" aria-hidden="true" style="width:{width:.2f}%">{parts}</div><ul>{words}</ul></div>'
    )


def _kind(stage: str) -> str:
    """Return the class of the colour of a stage."""
    if "decoding" in stage:
        return "decode"
    return "encode" if "encoding" in stage else "project"


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 or not share else "under 1 %"


def _number(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
