"""A file of prompts in, a file of answers out, whatever stops the work on the way."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.files import atomic_write
from ..data.loading import ROW, check_any_left, is_jsonl, load_rows, report_bad_rows, whole_row
from ..data.processes import processes
from ..states.fingerprints import checkpoint_fingerprint
from .batching import BatchLimits, OutputParts, PromptTable, answer, is_sampled, one_line, writing
from .text_to_text import TextToText


logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationReport:
    """
    What a run did.

    Args:
        rows: The number of prompts.
        duplicates: How many of them occurred before.
        kept: How many answers were there already, from a run that was stopped.
        tokens: The tokens of the answers that this run wrote, end tokens included.
        seconds: The time it took to write them, without loading the model and the data.
        cut: How many answers of this run ended at `max_new_tokens`, not by themselves.
    """

    rows: int
    duplicates: int
    kept: int
    tokens: int
    seconds: float
    cut: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of this run; 0 if it had nothing to write."""
        return self.tokens / self.seconds if self.seconds else 0.0


def generate_file(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    prompt_column: str = "prompt",
    *,
    column: str = "model_output",
    split: str = "train",
    limit: int | None = None,
    prompt_max_length: int | None = None,
    limits: BatchLimits | None = None,
    overlap: bool | None = None,
    seed: int | None = None,
    device: str = "cpu",
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    quantize: str | None = None,
    progress: Progress = lambda done, total: None,
    **generate_kwargs: Any,
) -> GenerationReport:
    """
    Answers every prompt of some data.

    Answers are kept in `<output>.part` as they come, and a run that was killed goes on from there; the output appears
    when it is complete. Prompts of similar length are answered together, the longest first; a prompt that occurs twice
    is read once, and answered once unless answers are sampled. Where the environment has `RANK` and `WORLD_SIZE`
    (`torchrun`), each process answers its part, and the last to finish writes the output.

    Args:
        model: A checkpoint, a folder or a name on the Hub, of any kind that answers.
        data: See [`load_rows`].
        output: The file to write; of a name that ends in `.jsonl` or `.jsonl.gz` the rows of the data with the answers
            in a column of their own, of any other one answer a line.
        prompt_column: The column that holds what the model reads.
        column: The column for the answers, in the place of one of that name, with a warning; all others are kept as
            they are.
        split: The split to take from a data set on the Hub.
        limit: Answer only this many prompts, from the top.
        prompt_max_length: Prompts are cut to this many tokens (default: the checkpoint's limit, or never).
        limits: How much is answered at once.
        overlap: See [`answer`].
        seed: Of sampled answers.
        device: Where to compute.
        skip_bad_rows: Leave out rows that hold no text or are too long for the model, with a warning.
        overwrite: Remove what another run has left.
        quantize: See [`TextToText.from_pretrained`].
        progress: Called with the numbers of answers done and in all.
        generate_kwargs: Arguments of `generate()`, such as `num_beams` and `max_new_tokens`.

    Raises:
        OSError: If the output cannot be written.
        ValueError: If the answers were to go where the prompts are, the model has no positions for a prompt and an
            answer, or what is left of a run was made by another model or other settings.
    """
    output, limits = Path(output), limits or BatchLimits()
    if column == prompt_column and is_jsonl(output):
        raise ValueError(
            f"The prompts are in the column {column!r}. Choose another one for the answers with --column."
        )
    rank, world = processes(overwrite)
    check_writable(output)
    rows = load_rows(data, prompt_column, split=split, limit=limit, skip_bad_rows=skip_bad_rows, number_rows=True)
    numbers, rows = rows[ROW][:], rows.remove_columns(ROW)
    if is_jsonl(output) and column in whole_row(rows[0]):
        logger.warning(f"{data}: the answers stand in the place of the column {column!r}, which is there already.")
    text_to_text = TextToText.from_pretrained(
        model, device=device, prompt_max_length=prompt_max_length, quantize=quantize
    )
    generate_kwargs = text_to_text.with_limit(generate_kwargs)
    sampled, longest = is_sampled(text_to_text, generate_kwargs), generate_kwargs.get("max_new_tokens", 0)
    table = _table(text_to_text, rows.select_columns([prompt_column]), sampled)
    bad = _without_room(text_to_text, table, longest)
    if bad:
        check_any_left(str(data), bad, len(rows))
        told = {numbers[at]: f"row {numbers[at]}: {error}" for at, error in bad.items()}
        report_bad_rows(str(data), told, skip_bad_rows)
        rows = rows.select([at for at in range(len(rows)) if at not in bad])
        table = _table(text_to_text, rows.select_columns([prompt_column]), sampled)
    prompts = rows.select_columns([prompt_column])
    settings = _settings(model, text_to_text, table, limits, seed, generate_kwargs)
    if quantize is not None:
        settings["quantize"] = quantize
    parts = OutputParts(output, settings, rank, overwrite)
    batches = table.batches(limits, parts.answers, rank, world)
    total, tokens, cut = table.answers(), 0, 0
    kept = done = sum(table.key(draw) in parts.answers for draw in set(table.draws))
    progress(done, total)
    start = time.perf_counter()

    def features(numbers: list[int]) -> dict[str, list[list[int]]]:
        return text_to_text.features(prompts[numbers][prompt_column])

    options = {"overlap": overlap, "seed": seed, "known": parts.answers, **generate_kwargs}
    for draws, ids in answer(text_to_text, table, batches, features, limits, **options):
        texts = text_to_text.tokenizer.batch_decode(ids, skip_special_tokens=True)
        parts.keep({table.key(draw): text for draw, text in zip(draws, texts, strict=True)})
        tokens += sum(map(len, ids))
        cut += sum(0 < longest == len(one) and text_to_text.tokenizer.eos_token_id != one[-1] for one in ids)
        done = min(done + world * len(draws), total)
        progress(done, total)
    seconds = time.perf_counter() - start
    if cut:
        logger.warning(f"{cut} answers were cut at {longest} tokens: allow longer ones with max_new_tokens.")
    answers = parts.read_all() if world > 1 else parts.answers
    if all(table.key(draw) in answers for draw in table.draws):  # of several processes, only the last finds all
        with writing(output, "All answers are kept; make room, and repeat the command."):
            _write(output, rows, column, (answers[table.key(draw)] for draw in table.draws))
        parts.remove()
    return GenerationReport(len(rows), len(rows) - len(table.rows), kept, tokens, seconds if batches else 0.0, cut)


def check_writable(output: Path) -> None:
    """Raises `OSError` unless a file can be made where `output` is to be, and something written to it."""
    with writing(output, "Choose another output, or make room."):
        if output.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        existing = next(parent for parent in output.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))


def _settings(
    model: str | Path,
    text_to_text: TextToText,
    table: PromptTable,
    limits: BatchLimits,
    seed: int | None,
    generate_kwargs: dict[str, Any],
) -> dict[str, Any]:
    settings = {"model": checkpoint_fingerprint(model), "texts": text_to_text.fingerprint(), **generate_kwargs}
    if table.sampled:  # a draw depends on what is drawn together
        settings |= {"seed": seed, "rows": limits.rows, "tokens": limits.tokens, "data": table.fingerprint()}
    return settings


def _table(text_to_text: TextToText, prompts: Dataset, sampled: bool) -> PromptTable:
    table = PromptTable(sampled)
    for batch in prompts.iter(batch_size=1000):
        (texts,) = batch.values()

        def lengths(new: list[int], texts: list[str] = texts) -> list[int]:
            return [len(ids) for ids in text_to_text.features([texts[place] for place in new])["input_ids"]]

        table.add(texts, lambda new: lengths(new) if new else [])
    return table


def _without_room(text_to_text: TextToText, table: PromptTable, new_tokens: int) -> dict[int, str]:
    """What is wrong with each row whose prompt and answer the model has no positions for."""
    problems = [text_to_text.position_problem(length, new_tokens) for length in table.lengths]
    return {row: problem for row, (number, _) in enumerate(table.draws) if (problem := problems[number])}


def _write(output: Path, rows: Dataset, column: str, answers: Iterator[str]) -> None:
    opener: Any = gzip.open if output.suffix == ".gz" else open
    # What UTF-8 has no bytes for, halves of surrogate pairs, is escaped, as it was in the JSON that it came from.
    with (
        atomic_write(output) as temporary,
        opener(temporary, "wt", encoding="utf-8", errors="backslashreplace") as file,
    ):
        if not is_jsonl(output):
            file.writelines(one_line(text) + "\n" for text in answers)
            return
        for row, text in zip(rows, answers, strict=True):
            # Dates, decimals and bytes, which JSON lines do not have, become texts.
            line = json.dumps({**whole_row(row), column: text}, ensure_ascii=False, default=str)
            file.write(line + "\n")
