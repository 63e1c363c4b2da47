"""Compare a model's outputs with those of the LLM that it replaces, with or without references."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.bad_rows import is_text, report_bad_rows
from ..data.conversations import conversation_in, read_conversations, sources_of
from ..data.loading import ROW, load_rows, whole_row
from ..data.records import COUNT, NUMBER, TEXT, Kind, list_of, mapping_to, record_of, versions
from ..inference.outputs import warn_of_blank_outputs
from ..inference.text_to_text import TextToText
from ..settings import EvaluateSettings
from .evaluate import loaded, without_long_prompts
from .metrics import check_installed, score, score_with_signatures
from .timing import speed, time_in_turns, time_output


logger = logging.getLogger(__name__)

_PROMPT = Kind("a text or a list", lambda value: isinstance(value, str | list))
# What the fields of a comparison must be to be shown.
COMPARISON = {
    "prompts": COUNT,
    **dict.fromkeys(("agreement", "scores", "llm_scores", "speed", "llm_speed"), mapping_to(NUMBER)),
    "speed_up": Kind("a number or null", lambda value: value is None or NUMBER.holds(value)),
    "worst": list_of(record_of({"chrf": NUMBER, "row": COUNT, "prompt": _PROMPT, "output": TEXT, "llm_output": TEXT})),
}


def compare(
    model: str | Path | TextToText,
    llm: str | Path | TextToText,
    data: str | Path,
    settings: EvaluateSettings = EvaluateSettings(),  # noqa: B008 - immutable
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """
    Score a model's outputs against the LLM's, and both against references if every row has one.

    Args:
        model: A checkpoint of any kind, or a loaded model.
        llm: The LLM with its decoder: a checkpoint, or a loaded model.
        data: Prompts with or without references, see [`load_rows`].
        settings: Which prompts, how both generate, how many outputs to time, and how many that differ most to return.
            If some rows hold no text in `target_column`, no references are used, with a warning; with
            `skip_bad_rows`, these rows are skipped instead.
        generate_kwargs: More arguments of `generate()`, for both; nothing is sampled unless `do_sample` is set.

    Returns:
        `agreement` (the model's outputs against the LLM's), `scores` and `llm_scores` (against references; empty
        without), `speed` and `llm_speed` (see [`speed`]; empty if nothing is timed), `speed_up` (the LLM's time per
        output, divided by the model's), `worst` (see [`least_agreement`]), `signatures`, `parameters`,
        `llm_parameters`, `prompts` (their number), `generation`, `versions`, `device`, `threads`.

    Raises:
        ValueError: If the data has bad rows or prompts that are too long, and `settings.skip_bad_rows` is not set.
    """
    generate_kwargs = settings.generate_kwargs() | generate_kwargs
    check_installed()
    rows = _load(data, settings)
    models = {"model": loaded(model, settings), "llm": loaded(llm, settings)}
    if settings.skip_bad_rows:
        rows = without_long_prompts(list(models.values()), rows, str(data), generate_kwargs)
    prompts = rows["prompt"][:]
    outputs, llm_outputs = (each.generate(prompts, settings.batch_size, **generate_kwargs) for each in models.values())
    warn_of_blank_outputs(outputs)
    agreement, signatures = score_with_signatures(outputs, llm_outputs)
    references = rows["target"][:] if "target" in rows.column_names else None
    return {
        "agreement": agreement,
        "scores": score(outputs, references) if references else {},
        "llm_scores": score(llm_outputs, references) if references else {},
        **_speeds(models, prompts[: settings.timed_outputs], generate_kwargs),
        "worst": least_agreement(rows["row"][:], prompts, outputs, llm_outputs, settings.worst),
        "signatures": signatures,
        "parameters": models["model"].parameters(),
        "llm_parameters": models["llm"].parameters(),
        "prompts": len(prompts),
        "generation": generate_kwargs,
        "versions": versions(),
        "device": str(models["model"].model.device),
        "threads": torch.get_num_threads(),
    }


def _speeds(
    models: Mapping[str, TextToText], prompts: Sequence[str], generate_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    contestants = {name: partial(time_output, model, **generate_kwargs) for name, model in models.items()}
    speeds = {name: speed(timings) for name, timings in time_in_turns(contestants, prompts).items()}
    speed_up = speeds["llm"]["ms_per_output"] / speeds["model"]["ms_per_output"] if prompts else None
    return {"speed": speeds["model"], "llm_speed": speeds["llm"], "speed_up": speed_up}


def _load(data: str | Path, settings: EvaluateSettings) -> Dataset:
    """Load the columns `prompt` and `row`, and `target` if the rows have references."""
    rows = load_rows(data, settings, number_rows=True)
    columns = (settings.prompt_column, settings.target_column)
    values = [whole_row(row) for row in rows]
    references = [read_conversations(row, sources_of(columns, row), 0)[0].get(columns[1]) for row in values]
    prompts = rows.select_columns([settings.prompt_column, ROW])
    prompts = prompts.rename_columns({settings.prompt_column: "prompt", ROW: "row"})
    return _with_references(prompts, references, str(data), settings.target_column, settings.skip_bad_rows)


def _with_references(rows: Dataset, references: list[Any], source: str, column: str, skip_bad_rows: bool) -> Dataset:
    """Add the column `target` if all references are texts; otherwise leave it out, or remove the rows without one."""
    given = [place for place, text in enumerate(references) if is_text(text)]
    if skip_bad_rows and 0 < len(given) < len(references):
        bad = np.delete(rows["row"][:], given)
        report_bad_rows(source, {int(row): f"row {row} has no text in {column!r}" for row in bad}, skip=True)
        rows, references = rows.select(given), [references[place] for place in given]
    default_column = EvaluateSettings().target_column
    if not given and column != default_column and all(text is None for text in references):
        raise ValueError(f"{source} has no column {column!r} to score against. Name an existing column, or none.")
    if len(given) == len(references):
        return rows.add_column("target", references)
    if any(text is not None for text in references):
        missing = len(references) - len(given)
        logger.warning(
            f"{source}: {missing} of {len(references)} rows have no text in {column!r}: references are not used."
        )
    return rows


def least_agreement(
    numbers: Sequence[int], prompts: Sequence[str], outputs: Sequence[str], llm_outputs: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """
    Return up to `count` prompts whose two outputs differ most by sentence chrF, the worst first.

    Args:
        numbers: Row number of each prompt. A repeated prompt counts once, with its first row.
        prompts: The prompts.
        outputs: The model's output for each.
        llm_outputs: The LLM's output for each.
        count: Return at most this many.

    Returns:
        Mappings with `row`, `prompt`, `output`, `llm_output` and `chrf`.
    """
    from sacrebleu import sentence_chrf

    rows: dict[str, dict[str, Any]] = {}
    for row, prompt, output, expected in zip(numbers, prompts, outputs, llm_outputs, strict=True):
        if prompt not in rows and output.strip() != expected.strip():
            chrf = sentence_chrf(output, [expected]).score
            texts = {"prompt": conversation_in(prompt) or prompt, "output": output, "llm_output": expected}
            rows[prompt] = {"row": row, **texts, "chrf": chrf}
    return sorted(rows.values(), key=lambda row: row["chrf"])[:count]
