"""Scores of answers, by the libraries that everybody quotes, and the time that answers take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data.loading import check_any_left, load_examples, report_bad_rows
from ..data.records import versions
from ..inference.text_to_text import TextToText


ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = ("bleu", "chrf", *ROUGE, "exact_match")


def score(answers: Sequence[str], references: Sequence[str], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """
    Scores answers against one reference each, from 0 to 100.

    Args:
        answers: What the model wrote.
        references: What it should have written, in the same order.
        metrics: Which of [`METRICS`] to compute.
    """
    return score_and_sign(answers, references, metrics)[0]


def score_and_sign(
    answers: Sequence[str], references: Sequence[str], metrics: Sequence[str] = METRICS
) -> tuple[dict[str, float], dict[str, str]]:
    """
    Like [`score`], with what says how the scores were computed.

    Returns:
        The scores, and sacrebleu's signatures with the version of rouge-score (mean F-measure without stemming, by its
        own tokenizer, which knows the letters a to z only).
    """
    scores: dict[str, float] = {}
    signatures: dict[str, str] = {}
    for name in ("bleu", "chrf"):
        if name in metrics:
            scores[name], signatures[name] = _sacrebleu(name, answers, references)
    wanted = [name for name in ROUGE if name in metrics]
    if wanted:
        scores.update(_rouge(wanted, answers, references))
        signatures["rouge"] = f"rouge-score {versions()['rouge-score']}"
    if "exact_match" in metrics:
        equal = sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True))
        scores["exact_match"] = 100 * equal / len(references)
    return scores, signatures


def _sacrebleu(name: str, answers: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    from sacrebleu.metrics import BLEU, CHRF

    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    return metric.corpus_score(answers, [references]).score, str(metric.get_signature())


def _rouge(names: list[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(names)
    rows = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in names}


def time_generations(text_to_text: TextToText, prompts: Sequence[str], **generate_kwargs: Any) -> dict[str, float]:
    """
    Measures how long answers take, one prompt at a time and from text to text.

    Args:
        text_to_text: The model.
        prompts: The prompts to time; the first is answered once more before the clock starts.
        generate_kwargs: Arguments of `generate()`.

    Returns:
        `ms_per_output`, `ms_per_token`, `tokens_per_answer` and `timed_outputs`.
    """
    text_to_text.generate([prompts[0]], **generate_kwargs)
    seconds, tokens = 0.0, 0
    for prompt in prompts:
        second, count = time_generation(text_to_text, prompt, **generate_kwargs)
        seconds, tokens = seconds + second, tokens + count
    return {
        "ms_per_output": 1000 * seconds / len(prompts),
        "ms_per_token": 1000 * seconds / tokens,
        "tokens_per_answer": tokens / len(prompts),
        "timed_outputs": len(prompts),
    }


def time_generation(text_to_text: TextToText, prompt: str, **generate_kwargs: Any) -> tuple[float, int]:
    """Seconds and tokens of the answer to one prompt, from text to text."""
    start = time.perf_counter()
    answer = text_to_text.generate_tokens([prompt], **generate_kwargs)
    text_to_text.tokenizer.batch_decode(answer, skip_special_tokens=True)
    return time.perf_counter() - start, len(answer[0])


def with_room(models: Sequence[TextToText], rows: Dataset, source: str, generate_kwargs: Mapping[str, Any]) -> Dataset:
    """
    The rows, numbered by a column `row`, whose prompts and answers all of some models have positions for; `ValueError`
    if there are none.
    """
    bad: dict[int, str] = {}
    for model in models:
        new_tokens = model.with_limit(dict(generate_kwargs)).get("max_new_tokens", 0)
        for row, ids in enumerate(model.features(rows["prompt"][:])["input_ids"]):
            if problem := model.position_problem(len(ids), new_tokens):
                bad[row] = problem
    check_any_left(source, bad, len(rows))
    if bad:
        numbers = rows["row"][:]
        report_bad_rows(source, {numbers[row]: reason for row, reason in bad.items()}, skip=True)
    return rows.select([row for row in range(len(rows)) if row not in bad])


def evaluate(
    model: str | Path | TextToText,
    data: str | Path,
    prompt_column: str = "prompt",
    target_column: str = "target",
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 32,
    timed_outputs: int = 50,
    skip_bad_rows: bool = False,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """
    Scores a model on pairs of texts, and times it.

    Args:
        model: A checkpoint of any of the three kinds, or one already loaded.
        data: A file or a data set on the Hub, see [`load_examples`].
        prompt_column: The column that holds what the model reads.
        target_column: The column that holds the references.
        split: The split to take from a data set on the Hub.
        limit: Score this many pairs, from the top (default: all).
        batch_size: How many prompts go through the model at once when it is scored. It is timed one at a time.
        timed_outputs: How many answers to time; 0 times none.
        skip_bad_rows: Leave out rows that hold no text or are too long for the model, with a warning.
        generate_kwargs: Arguments of `generate()`; without `do_sample` nothing is sampled.

    Returns:
        `scores`, `signatures`, `speed`, `parameters`, `pairs`, `generation`, `versions`, `device`, `dtype`, `threads`.
    """
    generate_kwargs = {"do_sample": False, **generate_kwargs}
    pairs = load_examples(
        data, prompt_column, target_column, split=split, limit=limit, skip_bad_rows=skip_bad_rows, number_rows=True
    )
    text_to_text = model if isinstance(model, TextToText) else TextToText.from_pretrained(model)
    if skip_bad_rows:
        pairs = with_room([text_to_text], pairs, str(data), generate_kwargs)
    prompts, references = pairs["prompt"][:], pairs["target"][:]
    answers = text_to_text.generate(prompts, batch_size, **generate_kwargs)
    scores, signatures = score_and_sign(answers, references)
    return {
        "scores": scores,
        "signatures": signatures,
        "speed": time_generations(text_to_text, prompts[:timed_outputs], **generate_kwargs) if timed_outputs else {},
        "parameters": text_to_text.parameters(),
        "pairs": len(prompts),
        "generation": generate_kwargs,
        "versions": versions(),
        "device": str(text_to_text.model.device),
        "dtype": str(text_to_text.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
