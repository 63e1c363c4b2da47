"""Sequence-level distillation (Kim and Rush, 2016): the LLM generates the targets that a small model trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.formats import is_jsonl
from ..data.output_paths import check_output
from ..data.processes import processes
from ..inference.files import generate_file
from ..settings import DistillSettings, GenerateFileSettings, RaySettings


def distill(
    llm: str | Path,
    data: str | Path,
    output: str | Path,
    settings: DistillSettings = DistillSettings(),  # noqa: B008 - immutable
    *,
    ray: RaySettings = RaySettings(),  # noqa: B008 - immutable
    progress: Callable[[int, int], None] = lambda done, total: None,
    **generate_kwargs: Any,
) -> int:
    """
    Generate the LLM's output for every prompt of a data set, and write it as one more column.

    This is [`generate_file`] for rows to train on: a run that was interrupted resumes, and processes that `torchrun`
    started, or workers of a Ray cluster, share the prompts.

    Args:
        llm: The checkpoint of an LLM, a folder or a name on the Hub. A decoder-only one continues its prompts, see
            [`DecoderOnlyTextToText`]; it should be tuned to.
        data: Prompts, see [`load_rows`].
        output: A file of JSON lines, `.jsonl` or `.jsonl.gz`.
        settings: Which rows to read, how to generate, and the column for the outputs, which replaces one of the same
            name; all other columns are kept.
        ray: A Ray cluster that generates.
        progress: Called with the number of prompts that are done, and of all.
        generate_kwargs: More arguments of `generate()`; sampling needs `do_sample=True`, whatever the LLM's default.

    Returns:
        The number of rows.

    Raises:
        FileExistsError: If the output exists and `settings.overwrite` is not set.
        ValueError: If the output is not a `.jsonl`, the outputs would replace the prompts, or an unfinished output
            comes from another LLM or other settings.
    """
    output = Path(output)
    if not is_jsonl(output):
        raise ValueError(f"{output} must end in .jsonl or .jsonl.gz.")
    check_output(output, overwrite=settings.overwrite or processes(settings.overwrite)[0] > 0, inputs=(llm, data))
    shared = {field.name: getattr(settings, field.name) for field in fields(settings)}
    file_settings = GenerateFileSettings(**shared, batch_tokens=None)
    report = generate_file(llm, data, output, file_settings, ray=ray, progress=progress, **generate_kwargs)
    return report.rows
