"""Sequence-level distillation: the LLM writes the answers that the small model is trained on (Kim and Rush, 2016)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..data.loading import is_jsonl
from ..inference.files import generate_file
from ..inference.loading import load
from ..settings import GenerateFileSettings


OUTPUT_COLUMN = "llm_output"


def distill(
    llm: str | Path,
    data: str | Path,
    output: str | Path,
    prompt_column: str = "prompt",
    *,
    column: str = OUTPUT_COLUMN,
    batch_size: int = 32,
    overwrite: bool = False,
    **kwargs: Any,
) -> int:
    """
    Has an LLM answer every prompt of some data, and writes the data with these answers in a column of their own: what
    [`generate_file`] does, for rows to train on.

    Args:
        llm: The checkpoint of an encoder-decoder, a folder or a name on the Hub.
        data: See [`load_rows`].
        output: A file of JSON lines, `.jsonl` or `.jsonl.gz`.
        prompt_column: The column that holds what the model reads.
        column: The column for the answers, in the place of one of that name; all others are kept as they are.
        batch_size: How many prompts are answered at once.
        overwrite: Replace an output, or what another run has left of one.
        kwargs: Of [`generate_file`], or of `generate()`, such as `num_beams` and `max_new_tokens`; without `do_sample`
            nothing is sampled, whatever the LLM's own default.

    Returns:
        The number of rows.

    Raises:
        FileExistsError: If the output exists.
        ValueError: If the output is no `.jsonl`, the answers were to go where the prompts are, the LLM is
            decoder-only, or what is left of a run was made by another LLM or other settings.
    """
    output = Path(output)
    if not is_jsonl(output):
        raise ValueError(f"{output} is none of .jsonl and .jsonl.gz, which answers are written as.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Choose another file, or add --overwrite.")
    if not getattr(load(AutoConfig, llm), "is_encoder_decoder", False):
        raise ValueError(
            f"{llm} is decoder-only, and nothing says where its prompts end and its answers begin: take an "
            "encoder-decoder, or write its answers to a column of the data with the tools that it comes with."
        )
    names = {field.name for field in fields(GenerateFileSettings)}
    settings = GenerateFileSettings(
        prompt_column=prompt_column, column=column, batch_size=batch_size, batch_tokens=None, overwrite=overwrite,
        **{name: kwargs.pop(name) for name in names & kwargs.keys()},
    )  # fmt: skip
    report = generate_file(llm, data, output, settings, **kwargs)
    return report.rows
