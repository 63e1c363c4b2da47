"""How a small model's answers compare with those of the LLM that it is to stand in for, with references or without."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.loading import ROW, is_text, load_rows, report_bad_rows, whole_row
from ..data.records import versions
from ..inference.text_to_text import TextToText
from .metrics import score_and_sign, time_generation, with_room


logger = logging.getLogger(__name__)


def compare(
    model: str | Path | TextToText,
    llm: str | Path | TextToText,
    data: str | Path,
    prompt_column: str = "prompt",
    target_column: str = "target",
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 32,
    timed_outputs: int = 50,
    worst: int = 5,
    skip_bad_rows: bool = False,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """
    Scores a model's answers against the LLM's, and both against the references where every row has one.

    Args:
        model: A checkpoint of any kind, or one already loaded.
        llm: The LLM with its decoder, in the same ways.
        data: Prompts, with or without answers, see [`load_rows`].
        prompt_column: The column that holds what the models read.
        target_column: The column that holds the references, if there is one. It is left aside, with a warning, where
            some of its rows hold no text; with `skip_bad_rows` these rows are.
        split: The split to take from a data set on the Hub.
        limit: Compare only this many answers, from the top.
        batch_size: How many prompts are answered at once. Answers are timed one at a time.
        timed_outputs: How many answers of each model are timed, in turns; 0 times none.
        worst: How many of the answers that agree least are returned, of those that differ.
        skip_bad_rows: Leave out rows that hold no text or are too long for a model, with a warning.
        generate_kwargs: Arguments of `generate()`, for both; without `do_sample` nothing is sampled.

    Returns:
        `agreement` (scores of the model's answers against the LLM's), `scores` and `llm_scores` (against references),
        `speed`, `llm_speed`, `speed_up` (time per answer, the LLM's by the model's), `worst`, `signatures`,
        `parameters`, `llm_parameters`, `prompts`, `generation`, `versions`, `device`, `threads`.
    """
    generate_kwargs = {"do_sample": False, **generate_kwargs}
    whole = load_rows(data, prompt_column, split=split, limit=limit, skip_bad_rows=skip_bad_rows, number_rows=True)
    rows = whole.select_columns([prompt_column, ROW]).rename_columns({prompt_column: "prompt", ROW: "row"})
    texts = [whole_row(row).get(target_column) for row in whole]
    rows = _with_references(rows, texts, str(data), target_column, skip_bad_rows)
    small = model if isinstance(model, TextToText) else TextToText.from_pretrained(model)
    large = llm if isinstance(llm, TextToText) else TextToText.from_pretrained(llm)
    if skip_bad_rows:
        rows = with_room([small, large], rows, str(data), generate_kwargs)
    prompts, references = rows["prompt"][:], rows["target"][:] if "target" in rows.column_names else None
    answers = small.generate(prompts, batch_size, **generate_kwargs)
    llm_answers = large.generate(prompts, batch_size, **generate_kwargs)
    agreement, signatures = score_and_sign(answers, llm_answers)
    speed = time_in_turns({"model": small, "llm": large}, prompts[:timed_outputs], **generate_kwargs)
    return {
        "agreement": agreement,
        "scores": score_and_sign(answers, references)[0] if references else {},
        "llm_scores": score_and_sign(llm_answers, references)[0] if references else {},
        "speed": speed.get("model", {}),
        "llm_speed": speed.get("llm", {}),
        "speed_up": speed["llm"]["ms_per_output"] / speed["model"]["ms_per_output"] if speed else None,
        "worst": least_agreement(rows["row"][:], prompts, answers, llm_answers, worst),
        "signatures": signatures,
        "parameters": small.parameters(),
        "llm_parameters": large.parameters(),
        "prompts": len(prompts),
        "generation": generate_kwargs,
        "versions": versions(),
        "device": str(small.model.device),
        "threads": torch.get_num_threads(),
    }


def _with_references(rows: Dataset, references: list[Any], source: str, column: str, skip_bad_rows: bool) -> Dataset:
    """Adds the column `answer`, if all references are texts; else leaves out the column, or the rows without one."""
    given = [row for row, text in enumerate(references) if is_text(text)]
    if skip_bad_rows and 0 < len(given) < len(references):
        bad = np.delete(rows["row"][:], given)
        report_bad_rows(source, {int(row): f"row {row} has no text in {column!r}" for row in bad}, skip=True)
        rows, references = rows.select(given), [references[row] for row in given]
    if not given and column != "target" and all(text is None for text in references):
        raise ValueError(f"{source} has no column {column!r} to score against. Name one that it has, or none.")
    if len(given) == len(references):
        return rows.add_column("target", references)
    if any(text is not None for text in references):
        missing = len(references) - len(given)
        logger.warning(f"{source}: {missing} of {len(references)} rows have no text in {column!r}: no references.")
    return rows


def time_in_turns(
    models: Mapping[str, TextToText], prompts: Sequence[str], **generate_kwargs: Any
) -> dict[str, dict[str, float]]:
    """
    Like [`time_generations`] for several models, which take turns on every prompt, so that what else a machine does meets
    all of them.
    """
    if not prompts:
        return {}
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in models}
    for model in models.values():
        model.generate([prompts[0]], **generate_kwargs)
    for prompt in prompts:
        for name, model in models.items():
            times[name].append(time_generation(model, prompt, **generate_kwargs))
    return {name: _speed(rows) for name, rows in times.items()}


def _speed(times: Sequence[tuple[float, int]]) -> dict[str, float]:
    seconds, tokens = sum(second for second, _ in times), sum(count for _, count in times)
    return {
        "ms_per_output": 1000 * seconds / len(times),
        "ms_per_token": 1000 * seconds / tokens,
        "tokens_per_answer": tokens / len(times),
        "timed_outputs": len(times),
    }


def least_agreement(
    numbers: Sequence[int], prompts: Sequence[str], answers: Sequence[str], llm_answers: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """
    Up to `count` prompts, each by its first row, whose two answers differ and agree least by the chrF of the sentence,
    the worst first.
    """
    from sacrebleu import sentence_chrf

    rows: dict[str, dict[str, Any]] = {}
    for row, prompt, answer, expected in zip(numbers, prompts, answers, llm_answers, strict=True):
        if prompt not in rows and answer.strip() != expected.strip():
            chrf = sentence_chrf(answer, [expected]).score
            rows[prompt] = {"row": row, "prompt": prompt, "target": answer, "llm_output": expected, "chrf": chrf}
    return sorted(rows.values(), key=lambda row: row["chrf"])[:count]
