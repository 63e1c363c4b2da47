"""Load prompts, or prompts with targets, from a file or from a data set on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, load_dataset

from ..files_llm2slm import first_line
from ..settings import DataSettings
from .bad_rows import check_columns, report_bad_rows, text_problem
from .causes import no_file
from .conversations import REPLACEMENTS, conversation_in, read_conversations, sources_of
from .formats import ROW_ERROR, file_format_of, is_empty, parse_rows, unknown_format
from .remote import as_file, is_elsewhere


ROW = "_row"  # a column with the number of each row in its source, from 0
LINE = "_line"  # a column with each row of JSON lines as JSON: typed columns would turn some strings into dates


def load_examples(
    source: str | Path,
    settings: DataSettings = DataSettings(),  # noqa: B008 - immutable
    target_column: str | Sequence[str] = "target",
    *,
    number_rows: bool = False,
) -> Dataset:
    """
    Load examples into a data set with the columns `prompt` and `target`. `datasets` keeps the texts on disk.

    Args:
        source: A file (`.jsonl`, `.json`, `.csv`, `.tsv` or `.txt`, also with `.gz`; or `.parquet`); a folder of
            `.parquet` or of `.jsonl` files; either of them at an address such as `s3://bucket/rows.parquet`; or the
            name of a data set on the Hub, with the configuration after a colon if it has several
            (`"user/name:config"`).
        settings: Which rows to read. Rows that cannot be read or hold no text are an error, or skipped by
            `skip_bad_rows`. `prompt_max_length` has no effect here. Where a column holds a conversation, the texts
            are those of [`read_conversations`].
        target_column: Column that holds the targets. Several columns give several examples per row.
        number_rows: Add the column `row`: the number of the row in the source, from 0.

    Raises:
        FileNotFoundError: If `source` is neither a file nor a data set that can be loaded.
        ValueError: If the file cannot be read, is empty, lacks a column, or has bad rows.
    """
    targets = [target_column] if isinstance(target_column, str) else list(target_column)
    columns = {settings.prompt_column: "prompt", **dict.fromkeys(targets, "target")}
    dataset, numbers = _load_texts(str(source), list(columns), settings)
    dataset = dataset.select_columns(list(columns))
    if len(columns) == 2:
        dataset = dataset.rename_columns(columns)
        return dataset.add_column("row", numbers) if number_rows else dataset

    def as_examples(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        texts = list(zip(*(rows[name] for name in targets), strict=True))
        return {
            "prompt": [prompt for prompt in rows[settings.prompt_column] for _ in targets],
            "target": [text for row in texts for text in row],
        }

    dataset = dataset.map(as_examples, batched=True, remove_columns=dataset.column_names)
    return dataset.add_column("row", np.repeat(numbers, len(targets))) if number_rows else dataset


def load_prompts(
    source: str | Path,
    settings: DataSettings = DataSettings(),  # noqa: B008 - immutable
    *,
    number_rows: bool = False,
) -> Dataset:
    """Load the column `prompt` alone (and `ROW`, if requested), see [`load_rows`]."""
    rows = load_rows(source, settings, number_rows=number_rows)
    kept = [name for name in (settings.prompt_column, ROW) if name in rows.column_names]
    prompts = rows.select_columns(kept).rename_columns({settings.prompt_column: "prompt"})
    if prompts.features["prompt"] != Value("string"):  # large_string, in some Parquet files
        prompts = prompts.cast_column("prompt", Value("string"))
    return prompts


def load_rows(
    source: str | Path,
    settings: DataSettings = DataSettings(),  # noqa: B008 - immutable
    *,
    number_rows: bool = False,
) -> Dataset:
    """
    Load whole rows, with or without targets: all columns, for [`whole_row`].

    Args:
        source: See [`load_examples`]. Each line of a `.txt` file, or of one without a known extension, is a prompt.
        settings: See [`load_examples`].
        number_rows: Add the column `ROW`.

    Raises:
        FileNotFoundError: See [`load_examples`].
        ValueError: See [`load_examples`].
    """
    path = Path(source).expanduser()
    file_format = file_format_of(path)
    is_text_file = (path.is_file() and file_format in ("text", None)) or (
        is_elsewhere(source) and file_format == "text"
    )
    column = "text" if is_text_file else settings.prompt_column
    dataset, numbers = _load_texts(str(source), [column], settings, default_format="text")
    dataset = dataset.rename_columns({column: settings.prompt_column})
    return dataset.add_column(ROW, numbers) if number_rows else dataset


def whole_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return all values of a row of [`load_rows`]; those of JSON lines exactly as the file has them."""
    if LINE in row:
        values: dict[str, Any] = json.loads(row[LINE])
        return values
    # Where another column replaces one, the replaced one was added here.
    added = {name for name, others in REPLACEMENTS.items() if conversation_in(row.get(name)) and {*others} & {*row}}
    return {name: conversation_in(value) or value for name, value in row.items() if name not in added}


def _load_texts(
    source: str, columns: list[str], settings: DataSettings, default_format: str | None = None
) -> tuple[Dataset, np.ndarray]:
    """Return the rows of a source whose `columns` all hold text, and the number of each row in the source."""
    dataset = _load(source, settings.split, columns, default_format)
    sources = sources_of(columns, dataset.column_names)
    check_columns(source, list(sources.values()), dataset.column_names)
    if settings.limit is not None:
        dataset = dataset.select(range(min(settings.limit, len(dataset))))
    if any(name != column or not isinstance(dataset.features[name], Value) for column, name in sources.items()):
        dataset = _with_texts(dataset, sources)
    bad, numbers = _bad_rows(dataset, columns), np.arange(len(dataset))
    if bad:
        report_bad_rows(source, bad, settings.skip_bad_rows)
        numbers = np.setdiff1d(numbers, list(bad))
        dataset = dataset.select(numbers)
    if not len(dataset):
        raise ValueError(f"{source} holds no rows.")
    return (dataset.remove_columns(ROW_ERROR) if ROW_ERROR in dataset.column_names else dataset), numbers


def _with_texts(dataset: Dataset, sources: Mapping[str, str]) -> Dataset:
    """Add the texts of conversations under the names of the needed columns, and why a row has none."""
    features = Features({**dataset.features, **dict.fromkeys([*sources, ROW_ERROR], Value("string"))})
    return dataset.map(lambda row, number: _texts(row, sources, number), with_indices=True, features=features)


def _texts(row: Mapping[str, Any], sources: Mapping[str, str], number: int) -> dict[str, Any]:
    """Return the texts of a row by the names of the needed columns, and why it has none as `ROW_ERROR`."""
    values, problem = read_conversations(row, sources, number)
    problem = problem or text_problem(values, list(sources), number)
    return {**{name: None if problem else values[name] for name in sources}, ROW_ERROR: problem}


def _bad_rows(dataset: Dataset, columns: Sequence[str]) -> dict[int, str]:
    """Return the problem of each row without text in one of the columns, by row number."""
    suspects: set[int] = set()
    for column in columns:
        is_string = getattr(dataset.features[column], "dtype", "") in ("string", "large_string")
        if not is_string or dataset.data.column(column).null_count:
            suspects.update(row for row, text in enumerate(dataset[column]) if not isinstance(text, str))
    return {row: str(text_problem(dataset[row], columns, row)) for row in sorted(suspects)}


def _load(source: str, split: str, columns: Sequence[str], default_format: str | None) -> Dataset:
    with as_file(source) as path:
        file_format = file_format_of(path)
        if path.is_file():
            return _load_file(source, path, columns, file_format or default_format)
        if file_format is not None or source.count("/") > 1:
            raise no_file(source, "data file")
        return _load_from_hub(source, split)


def _load_file(source: str, path: Path, columns: Sequence[str], file_format: str | None) -> Dataset:
    if file_format is None:
        raise ValueError(unknown_format(source))
    if is_empty(path):
        raise ValueError(f"{source} holds no rows.")
    if file_format != "parquet":
        return _load_rows(path, file_format, columns)
    try:
        return load_dataset(file_format, data_files=str(path), split="train")
    except Exception as error:  # each reader raises its own exceptions
        raise ValueError(
            f"{source} cannot be read as {file_format}: {first_line(error.__cause__ or error)}"
        ) from error


def _load_rows(path: Path, file_format: str, columns: Sequence[str]) -> Dataset:
    """
    Load the rows of a file that is not Parquet: the given columns, why a row has no text in one of them, and the whole
    row, which is JSON for JSON, and all columns for a table.
    """
    names = _column_names(path, file_format, columns)
    sources = sources_of(columns, names)
    check_columns(str(path), list(sources.values()), names)
    kept = [*columns, LINE] if file_format == "json" else list(dict.fromkeys([*names, *columns]))
    features = Features({name: Value("string") for name in [*kept, ROW_ERROR]})
    # `datasets` caches by these arguments: the modification time makes it read a changed file again.
    arguments = {"path": path, "sources": sources, "kept": tuple(kept), "changed": path.stat().st_mtime_ns}
    return Dataset.from_generator(_rows_as_texts, features=features, gen_kwargs=arguments)


def _column_names(path: Path, file_format: str, columns: Sequence[str]) -> list[str]:
    """Return the column names of rows, reading from the top until all of `columns` were found."""
    seen: dict[str, Any] = {}
    for row in parse_rows(path):
        seen = row | seen
        if seen.keys() >= set(sources_of(columns, seen).values()):
            break
    error = seen.pop(ROW_ERROR, None)
    if not seen:
        raise ValueError(f"{path} cannot be read as {file_format}: {error}" if error else f"{path} holds no rows.")
    return list(seen)


def _rows_as_texts(
    path: Path, sources: Mapping[str, str], kept: Sequence[str], changed: int
) -> Iterator[Mapping[str, Any]]:
    for number, row in enumerate(parse_rows(path)):
        texts = _texts(row, sources, number)
        whole = {LINE: json.dumps(row)} if LINE in kept else {}
        others = {name: row.get(name, "") if texts[ROW_ERROR] is None else None for name in kept if name not in texts}
        yield {**others, **texts, **whole}


def _load_from_hub(name: str, split: str) -> Dataset:
    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # offline, unknown, gated, no such split: each raises its own exception
        raise FileNotFoundError(
            f"{name} is neither a file nor a data set that can be loaded from the Hub: {first_line(error)}"
        ) from error
