"""Score a model on examples, and time it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data.bad_rows import good_rows
from ..data.loading import load_examples
from ..data.records import versions
from ..inference.outputs import warn_of_blank_outputs
from ..inference.text_to_text import TextToText
from ..settings import EvaluateSettings
from .metrics import check_installed, score_with_signatures
from .timing import speed, time_in_turns, time_output


def evaluate(
    model: str | Path | TextToText,
    data: str | Path,
    settings: EvaluateSettings = EvaluateSettings(),  # noqa: B008 - immutable
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """
    Score a model's outputs against references, and time them.

    Args:
        model: A checkpoint of any kind, or a loaded model.
        data: A file or a data set on the Hub, see [`load_examples`].
        settings: Which examples, how to generate, and how many outputs to time.
        generate_kwargs: More arguments of `generate()`; nothing is sampled unless `do_sample` is set.

    Returns:
        `scores` and `signatures` by metric, `speed` (see [`speed`]; empty if nothing is timed), `parameters`,
        `examples` (their number), `generation` (arguments of `generate()`), `versions`, `device`, `dtype`, `threads`.

    Raises:
        ValueError: If the data has bad rows or prompts that are too long, and `settings.skip_bad_rows` is not set.
    """
    generate_kwargs = settings.generate_kwargs() | generate_kwargs
    check_installed()
    examples = load_examples(data, settings, settings.target_column, number_rows=True)
    text_to_text = loaded(model, settings)
    if settings.skip_bad_rows:
        examples = without_long_prompts([text_to_text], examples, str(data), generate_kwargs)
    prompts, references = examples["prompt"][:], examples["target"][:]
    outputs = text_to_text.generate(prompts, settings.batch_size, **generate_kwargs)
    warn_of_blank_outputs(outputs)
    scores, signatures = score_with_signatures(outputs, references)
    timed = {"model": partial(time_output, text_to_text, **generate_kwargs)}
    return {
        "scores": scores,
        "signatures": signatures,
        "speed": speed(time_in_turns(timed, prompts[: settings.timed_outputs])["model"]),
        "parameters": text_to_text.parameters(),
        "examples": len(prompts),
        "generation": generate_kwargs,
        "versions": versions(),
        "device": str(text_to_text.model.device),
        "dtype": str(text_to_text.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def loaded(model: str | Path | TextToText, settings: EvaluateSettings) -> TextToText:
    """Load a checkpoint, with the settings' `prompt_max_length`; return a loaded model as it is."""
    if isinstance(model, TextToText):
        return model
    return TextToText.from_pretrained(model, prompt_max_length=settings.prompt_max_length)


def without_long_prompts(
    models: Sequence[TextToText], rows: Dataset, source: str, generate_kwargs: Mapping[str, Any]
) -> Dataset:
    """
    Remove the prompts that leave one of the models too few positions for an output, with a warning.

    Args:
        models: The models.
        rows: A data set with the columns `prompt` and `row` (its number in the source).
        source: Where the rows come from, for messages.
        generate_kwargs: Arguments of `generate()`, which limit the length of outputs.

    Raises:
        ValueError: If no prompt is left.
    """
    problems: dict[int, str] = {}
    for model in models:
        new_tokens = model.with_limit(dict(generate_kwargs)).get("max_new_tokens", 0)
        for index, ids in enumerate(model.features(rows["prompt"][:])["input_ids"]):
            if problem := model.position_problem(len(ids), new_tokens):
                problems[index] = f"is too long: {problem}"
    return rows.select(good_rows(source, rows["row"][:], problems, skip=True))
