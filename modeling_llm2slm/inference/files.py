"""Generate for a file of prompts, and write a file of outputs. An interrupted run resumes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from ..data.atomic import atomic_write, is_stream
from ..data.bad_rows import good_rows
from ..data.cluster import Workers, connected, path_for_workers
from ..data.formats import is_jsonl, open_file
from ..data.loading import ROW, load_rows, whole_row
from ..data.output_paths import claimed
from ..data.processes import processes
from ..settings import GenerateFileSettings, RaySettings, check_generate_arguments
from .batching import BatchLimits, OutputId, PromptTable
from .engine import fingerprint_of
from .map_batches import GenerateRows, lengths_of, load_options
from .outputs import OutputParts, one_line, warn_of_blank_outputs, writing
from .text_to_text import Features, TextToText, is_sampled


logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationReport:
    """
    The result of a run.

    Args:
        rows: Number of prompts.
        duplicates: Number of prompts that occurred before.
        kept: Number of outputs that an interrupted run had generated.
        tokens: Number of tokens that this run generated, end tokens included.
        seconds: Seconds that this run generated for, without loading the model and the data.
        truncated: Number of outputs of this run that ended at `max_new_tokens`.
    """

    rows: int
    duplicates: int
    kept: int
    tokens: int
    seconds: float
    truncated: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second; 0 if this run had nothing to generate."""
        return self.tokens / self.seconds if self.seconds else 0.0


def generate_file(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    settings: GenerateFileSettings = GenerateFileSettings(),  # noqa: B008 - immutable
    *,
    ray: RaySettings = RaySettings(),  # noqa: B008 - immutable
    progress: Progress = lambda done, total: None,
    **generate_kwargs: Any,
) -> GenerationReport:
    """
    Generate for every prompt of a data set.

    Outputs are stored in `<output>.part` as they are generated, and an interrupted run resumes from there; the output
    appears when it is complete. Prompts of similar length share a batch, the longest first. A prompt that occurs twice
    is read once, and generated for once unless outputs are sampled. If the environment has `RANK` and `WORLD_SIZE`
    (`torchrun`), each process generates a share, and the last one to finish writes the output. On a Ray cluster, this
    process sends out batches and writes what comes back.

    Args:
        model: A checkpoint of any kind, a folder or a name on the Hub.
        data: The prompts, see [`load_rows`].
        output: The file to write. A name that ends in `.jsonl` or `.jsonl.gz` gets the rows of the data with the
            outputs in a column of their own, which replaces a column of that name; any other name gets one output per
            line.
        settings: Which columns to read, and how to generate.
        ray: A Ray cluster that generates.
        progress: Called with the number of outputs so far and in all.
        generate_kwargs: Arguments of `model.generate()`, in addition to `settings.generate_kwargs()`.

    Raises:
        FileExistsError: If the output exists and `settings.overwrite` is not set.
        OSError: If the output cannot be written, or another run writes to it.
        ValueError: If the outputs would replace the prompts, a prompt and its output do not fit into the model's
            positions, or an interrupted run had another model, other data or other settings.
    """
    output, limits = Path(output), BatchLimits(settings.batch_size, settings.batch_tokens)
    check_generate_arguments(generate_kwargs)
    if settings.column == settings.prompt_column and is_jsonl(output):
        raise ValueError(f"Column {settings.column!r} holds the prompts. Name another one for the outputs (--column).")
    rank, world = processes(settings.overwrite)
    with ExitStack() as stack:
        stack.enter_context(claimed(output, overwrite=settings.overwrite, inputs=(model, data), rank=rank))
        rows = _load(data, output, settings)
        workers = stack.enter_context(connected(ray, settings.device))
        text_to_text = _loaded(model, settings, workers)
        generate_kwargs = text_to_text.with_limit({**settings.generate_kwargs(), **generate_kwargs})
        rows, table = _fitting_rows(text_to_text, rows, data, settings, generate_kwargs)
        run_settings = _run_settings(model, text_to_text, table, settings, generate_kwargs)
        parts = OutputParts(stack.enter_context(_place_of_parts(output)), run_settings, rank, settings.overwrite)
        batches = table.batches(limits, parts.outputs, rank, world)
        counts = _Counts(text_to_text, table, parts, generate_kwargs.get("max_new_tokens", 0), world, progress)
        prompts = rows.select_columns([settings.prompt_column])
        start = time.perf_counter()
        if workers is not None:
            generated = _generated_by(workers, model, table, batches, prompts, settings, generate_kwargs)
        else:
            options = {"overlap": settings.overlap, "seed": settings.seed, "known": parts.outputs, **generate_kwargs}
            features_of = partial(_features, text_to_text, prompts)
            generated = text_to_text.generate_batches(table, batches, features_of, limits, **options)
        for ids, tokens in generated:
            texts = text_to_text.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            parts.keep({table.key(one): text for one, text in zip(ids, texts, strict=True)})
            counts.add(ids, tokens)
        seconds = time.perf_counter() - start if batches else 0.0
        if counts.truncated:
            logger.warning(
                f"{counts.truncated} outputs were cut at {counts.longest} tokens. Set a higher max_new_tokens."
            )
        warn_of_blank_outputs(parts.outputs.values())
        _finish(output, rows, settings.column, table, parts)
        return GenerationReport(
            len(rows), len(rows) - len(table.rows), counts.kept, counts.tokens, seconds, counts.truncated
        )


def _loaded(model: str | Path, settings: GenerateFileSettings, workers: Workers | None) -> TextToText:
    """Return the model; without its weights if workers of a cluster have it, as this machine may not hold them."""
    options = load_options(settings)
    if workers is None:
        return TextToText.from_pretrained(model, **options)
    return workers.call(
        _load_reader, path_for_workers(model), options | {"engine": None, "device": "cpu", "quantize": None}
    )


def _load_reader(model: str, options: dict[str, Any]) -> TextToText:
    return TextToText.from_pretrained(model, **options).without_model()


def _features(text_to_text: TextToText, prompts: Dataset, indices: list[int]) -> Features:
    (texts,) = prompts[indices].values()
    return text_to_text.features(texts)


def _generated_by(
    workers: Workers,
    model: str | Path,
    table: PromptTable,
    batches: Sequence[Sequence[OutputId]],
    prompts: Dataset,
    settings: GenerateFileSettings,
    generate_kwargs: dict[str, Any],
) -> Iterator[tuple[Sequence[OutputId], list[list[int]]]]:
    """Yield what [`TextToText.generate_batches`] yields, computed by the workers of a cluster."""
    arguments = {"model": path_for_workers(model), "settings": settings, **generate_kwargs}
    numbers = ([table.rows[prompt_index] for prompt_index, _ in batch] for batch in batches)
    items = ((next(iter(prompts[rows].values())), rows) for rows in numbers)
    for index, tokens in workers.map(GenerateRows, arguments, items):
        yield batches[index], tokens


@contextmanager
def _place_of_parts(output: Path) -> Iterator[Path]:
    """Yield the path that the parts of an output are named after. Nothing is resumed from those of a device."""
    if is_stream(output):
        with TemporaryDirectory() as folder:
            yield Path(folder, output.name)
    else:
        yield output


class _Counts:
    """Counts outputs and tokens of this process, and reports progress."""

    def __init__(
        self,
        text_to_text: TextToText,
        table: PromptTable,
        parts: OutputParts,
        longest: int,
        world: int,
        progress: Progress,
    ):
        self.kept = self.done = sum(table.key(one) in parts.outputs for one in set(table.outputs))
        self.total = table.output_count()
        self.longest = longest
        self.tokens = self.truncated = 0
        self._end = text_to_text.tokenizer.eos_token_id
        self._world = world
        self._progress = progress
        progress(self.done, self.total)

    def add(self, ids: Sequence[OutputId], tokens: Sequence[Sequence[int]]) -> None:
        """Count a batch. The other processes are assumed to be as far."""
        self.tokens += sum(map(len, tokens))
        self.truncated += sum(0 < self.longest == len(one) and self._end != one[-1] for one in tokens)
        self.done = min(self.done + self._world * len(ids), self.total)
        self._progress(self.done, self.total)


def _load(data: str | Path, output: Path, settings: GenerateFileSettings) -> Dataset:
    rows = load_rows(data, settings, number_rows=True)
    if is_jsonl(output) and settings.column in whole_row(rows[0]):
        logger.warning(f"{data}: the outputs replace the column {settings.column!r}.")
    return rows


def _fitting_rows(
    text_to_text: TextToText,
    rows: Dataset,
    data: str | Path,
    settings: GenerateFileSettings,
    generate_kwargs: dict[str, Any],
) -> tuple[Dataset, PromptTable]:
    """Return the rows that fit into the model's positions, and their prompts. Others are reported as bad rows."""
    row_numbers, rows = rows[ROW][:], rows.remove_columns(ROW)
    sampled, new_tokens = is_sampled(text_to_text, generate_kwargs), generate_kwargs.get("max_new_tokens", 0)
    table = _table(text_to_text, rows.select_columns([settings.prompt_column]), sampled)
    problems = [text_to_text.position_problem(length, new_tokens) for length in table.lengths]
    bad = {
        row: f"is too long: {problem}"
        for row, (prompt_index, _) in enumerate(table.outputs)
        if (problem := problems[prompt_index])
    }
    if not bad:
        return rows, table
    rows = rows.select(good_rows(str(data), row_numbers, bad, settings.skip_bad_rows))
    return rows, _table(text_to_text, rows.select_columns([settings.prompt_column]), sampled)


def _table(text_to_text: TextToText, prompts: Dataset, sampled: bool) -> PromptTable:
    table = PromptTable(sampled)
    for batch in prompts.iter(batch_size=1000):
        (texts,) = batch.values()
        table.add(texts, partial(lengths_of, text_to_text, texts))
    return table


def _run_settings(
    model: str | Path,
    text_to_text: TextToText,
    table: PromptTable,
    settings: GenerateFileSettings,
    generate_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the settings that an output depends on, in addition to its prompt."""
    run = {"model": fingerprint_of(model), "texts": text_to_text.fingerprint(), **generate_kwargs}
    if table.sampled:  # a sampled output depends on its batch
        run |= {"seed": settings.seed, "rows": settings.batch_size, "tokens": settings.batch_tokens}
        run["data"] = table.fingerprint()
    given = {name: getattr(settings, name) for name in ("engine", "quantize", "dtype")}
    return run | {name: value for name, value in given.items() if value is not None}


def _finish(output: Path, rows: Dataset, column: str, table: PromptTable, parts: OutputParts) -> None:
    """Write the output, if all processes are done, and remove the parts."""
    keys, outputs = set(map(table.key, table.outputs)), parts.outputs
    if not keys <= outputs.keys():  # the rest is the share of other processes
        outputs = parts.read_all()
    if not keys <= outputs.keys():
        return
    with writing(output, "All outputs are kept: free some disk space, and repeat the command."):
        _write(output, rows, column, (outputs[table.key(one)] for one in table.outputs))
    parts.remove()


def _write(output: Path, rows: Dataset, column: str, outputs: Iterator[str]) -> None:
    # Halves of surrogate pairs, which UTF-8 cannot encode, are escaped, as in the JSON that they came from.
    with (
        atomic_write(output) as temporary,
        open_file(temporary, "wt", encoding="utf-8", errors="backslashreplace") as file,
    ):
        if not is_jsonl(output):
            file.writelines(one_line(text) + "\n" for text in outputs)
            return
        for row, text in zip(rows, outputs, strict=True):
            # Dates, decimals and bytes become texts, since JSON has no such values.
            line = json.dumps({**whole_row(row), column: text}, ensure_ascii=False, default=str)
            file.write(line + "\n")
