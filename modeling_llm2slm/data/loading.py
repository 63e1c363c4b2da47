"""What goes in and out: pairs of texts, a tokenizer trained on them, and results that are never half there."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, load_dataset

from ..files_llm2slm import first_line


logger = logging.getLogger(__name__)


# What `datasets` calls the format of a file, by the ending of its name (".gz" aside).
FILE_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
ROW_ERROR = "_error"  # a column that says why a row could not be read
ROW = "_row"  # a column with the number of each row in its source, from 0
LINE = "_line"  # a column with each row of JSON lines, as JSON: columns of `datasets` would make dates of some texts


def load_examples(
    source: str | Path,
    prompt_column: str = "prompt",
    target_column: str | Sequence[str] = "target",
    *,
    split: str = "train",
    limit: int | None = None,
    skip_bad_rows: bool = False,
    number_rows: bool = False,
) -> Dataset:
    """
    Reads pairs of texts into a data set with the two columns `prompt` and `answer`. Texts stay on disk, where
    `datasets` keeps them.

    Args:
        source: A file (`.jsonl`, `.json`, `.csv`, `.tsv` or `.txt`, also as `.gz`, or `.parquet`), or the name of a
            data set on the Hub, with a configuration after a colon where it has several (`"user/name:config"`).
        prompt_column: The column that holds what the model reads.
        target_column: The column that holds what the model shall write. Of several, each gives every row a pair.
        split: The split to take from a data set on the Hub. A file is one split.
        limit: Keep only this many rows, from the top.
        skip_bad_rows: Leave out rows that cannot be read or hold something that is not text, with a warning that
            numbers them, in place of an error that does.
        number_rows: Add the column `row`, the number of the row in the source, from 0.

    Raises:
        FileNotFoundError: If `source` is neither a file nor a data set that can be reached.
        ValueError: If the file cannot be read, is empty, lacks a column, or has bad rows.
    """
    answers = [target_column] if isinstance(target_column, str) else list(target_column)
    columns = {prompt_column: "prompt", **dict.fromkeys(answers, "target")}
    dataset, numbers = _load_texts(str(source), columns, split, limit, skip_bad_rows)
    dataset = dataset.select_columns(list(columns))
    if len(columns) == 2:
        dataset = dataset.rename_columns(columns)
        return dataset.add_column("row", numbers) if number_rows else dataset

    def as_pairs(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        texts = list(zip(*(rows[name] for name in answers), strict=True))
        return {
            "prompt": [prompt for prompt in rows[prompt_column] for _ in answers],
            "target": [text for row in texts for text in row],
        }

    dataset = dataset.map(as_pairs, batched=True, remove_columns=dataset.column_names)
    return dataset.add_column("row", np.repeat(numbers, len(answers))) if number_rows else dataset


def load_prompts(source: str | Path, prompt_column: str = "prompt", **options: Any) -> Dataset:
    """Like [`load_rows`], with the same options: the column `prompt` alone, and `ROW` where that is asked for."""
    rows = load_rows(source, prompt_column, **options)
    kept = [name for name in (prompt_column, ROW) if name in rows.column_names]
    prompts = rows.select_columns(kept).rename_columns({prompt_column: "prompt"})
    if prompts.features["prompt"] != Value("string"):  # large_string, in some Parquet files
        prompts = prompts.cast_column("prompt", Value("string"))
    return prompts


def load_rows(
    source: str | Path,
    prompt_column: str = "prompt",
    *,
    split: str = "train",
    limit: int | None = None,
    skip_bad_rows: bool = False,
    number_rows: bool = False,
) -> Dataset:
    """
    Like [`load_examples`], for data that may have no answers: all columns, for [`whole_row`].

    Args:
        source: See [`load_examples`]. Of a `.txt` file, and of one of a name that says no format, every line is a prompt.
        prompt_column: The column that holds what the model reads.
        split: See [`load_examples`].
        limit: See [`load_examples`].
        skip_bad_rows: See [`load_examples`].
        number_rows: Add the column `ROW`.
    """
    path = Path(source).expanduser()
    is_text = path.is_file() and file_format_of(path) in ("text", None)
    column = "text" if is_text else prompt_column
    dataset, numbers = _load_texts(str(source), {column: "prompt"}, split, limit, skip_bad_rows, "text")
    dataset = dataset.rename_columns({column: prompt_column})
    return dataset.add_column(ROW, numbers) if number_rows else dataset


def whole_row(row: dict[str, Any]) -> dict[str, Any]:
    """All values of one of [`load_rows`], those of JSON lines as they are there."""
    values: dict[str, Any] = json.loads(row[LINE]) if LINE in row else row
    return values


def _load_texts(
    source: str,
    columns: dict[str, str],
    split: str,
    limit: int | None,
    skip_bad_rows: bool,
    default_format: str | None = None,
) -> tuple[Dataset, np.ndarray]:
    """
    The rows of a source, with texts in all the columns that are named, each with what it is to us; and the number of
    each row in the source.
    """
    dataset = _load(source, split, list(columns), default_format)
    check_columns(source, list(columns), dataset.column_names)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    bad, numbers = _bad_rows(dataset, columns), np.arange(len(dataset))
    if bad:
        report_bad_rows(source, bad, skip_bad_rows)
        numbers = np.setdiff1d(numbers, list(bad))
        dataset = dataset.select(numbers)
    if not len(dataset):
        raise ValueError(f"{source} holds no rows.")
    return (dataset.remove_columns(ROW_ERROR) if ROW_ERROR in dataset.column_names else dataset), numbers


def check_columns(source: str, needed: Sequence[str], there: Sequence[str]) -> None:
    """Raises `ValueError` if a column is not there."""
    is_text = file_format_of(Path(source)) == "text"
    for column in needed:
        if column not in there:
            raise ValueError(
                f"{source} has prompts and no answers: take a file with a column of each, such as a .jsonl, or "
                "compare with an LLM, `llm2slm evaluate --against`."
                if is_text
                else f"{source} has no column {column!r}; it has {', '.join(map(repr, there))}. "
                "Name the columns with prompt_column and target_column."
            )


def report_bad_rows(source: str, bad: Mapping[int, str], skip: bool) -> None:
    """Raises `ValueError` with the numbers of bad rows and what is wrong with the first, or logs it if they go."""
    numbers = ", ".join(map(str, list(bad)[:10])) + (", ..." if len(bad) > 10 else "")
    if skip:
        last = list(bad.values())[-1]  # which may be that there is no more to be read
        logger.warning(f"{source}: {len(bad)} bad rows were skipped: {numbers}. The last: {last}.")
        return
    others = f" There are {len(bad)} bad rows: {numbers}." if len(bad) > 1 else ""
    raise ValueError(f"{source}: {next(iter(bad.values()))}.{others} Mend them, or leave them out with skip_bad_rows.")


def check_any_left(source: str, bad: Mapping[int, str], rows: int) -> None:
    """Raises `ValueError`, with what is wrong with the first, where all rows are bad."""
    if len(bad) == rows:
        raise ValueError(f"{source}: no row can be used; {next(iter(bad.values()))}.")


def _bad_rows(dataset: Dataset, columns: Mapping[str, str]) -> dict[int, str]:
    """What is wrong with each row in which one of the columns holds no text."""
    bad: dict[int, str] = {}
    for column, name in columns.items():
        is_text = getattr(dataset.features[column], "dtype", "") in ("string", "large_string")
        if is_text and dataset.data.column(column).null_count == 0:
            continue
        for row, text in enumerate(dataset[column]):
            if not isinstance(text, str):
                error = dataset[row][ROW_ERROR] if ROW_ERROR in dataset.column_names else None
                bad.setdefault(row, error or f"the {name} of row {row} is {text!r}, not a text")
    return dict(sorted(bad.items()))


def _load(source: str, split: str, columns: Sequence[str], default_format: str | None) -> Dataset:
    path = Path(source).expanduser()
    file_format = file_format_of(path)
    if not path.is_file():
        if file_format is not None or source.count("/") > 1 or path.is_dir():
            raise FileNotFoundError(f"There is no data file {source}.")
        return _load_from_hub(source, split)
    file_format = file_format or default_format
    if file_format is None:
        raise ValueError(f"{source} is none of {', '.join(FILE_FORMATS)}: the ending of the name tells the format.")
    if _is_empty(path):
        raise ValueError(f"{source} holds no rows.")
    if is_jsonl(path):
        return _read_lines(path, columns)
    try:
        return load_dataset(file_format, data_files=str(path), split="train", **reading_options(path))
    except Exception as error:  # every reader has exceptions of its own
        reason = first_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            raise ValueError(f"{source} holds no rows.") from error
        raise ValueError(f"{source} cannot be read as {file_format}: {reason}") from error


def opened(path: Path, mode: str, **options: Any) -> Any:
    """A file, which may be compressed."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, **options)


def _is_empty(path: Path) -> bool:
    try:
        with opened(path, "rb") as content:
            return not content.read(1)
    except (OSError, EOFError):  # a damaged archive, of which the reader says more
        return False


def file_format_of(path: Path) -> str | None:
    """What `datasets` calls the format of a file, by its name."""
    return FILE_FORMATS.get(_ending(path))


def reading_options(path: Path) -> dict[str, Any]:
    """What `datasets` needs to be told to read a file."""
    if file_format_of(path) != "csv":
        return {}
    # All in a table is text, also what is empty, says "NA" or is a number: a guess from the first rows may fail later.
    options: dict[str, Any] = {"keep_default_na": False, "sep": "\t" if _ending(path) == ".tsv" else ","}
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        names = next((row for row in csv.reader(file, delimiter=options["sep"]) if row), [])
    if names and "" not in names and len(set(names)) == len(names):  # else the reader makes names of its own
        options["features"] = Features({name: Value("string") for name in names})
    return options


def _ending(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")


def is_jsonl(path: Path) -> bool:
    """Whether a name says JSON lines."""
    return path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]


def _read_lines(path: Path, columns: Sequence[str]) -> Dataset:
    """JSON lines: the columns that are named, each row as a whole, and a reason where a row has no texts in them."""
    check_columns(str(path), columns, _names(path, columns))
    features = Features({name: Value("string") for name in [*columns, LINE, ROW_ERROR]})
    # The time of the last change is there for the cache, which goes by these arguments.
    stamp = {"columns": tuple(columns), "changed": path.stat().st_mtime_ns}
    return Dataset.from_generator(_lines_as_texts, features=features, gen_kwargs={"path": path, **stamp})


def _names(path: Path, columns: Sequence[str]) -> list[str]:
    """The names of columns in JSON lines, read from the top until those that are named have been seen."""
    seen: dict[str, Any] = {}
    for row in parse_lines(path, None):
        seen = row | seen
        if seen.keys() >= set(columns):
            break
    error = seen.pop(ROW_ERROR, None)
    if not seen:
        raise ValueError(f"{path} cannot be read as json: {error}" if error else f"{path} holds no rows.")
    return list(seen)


def _lines_as_texts(path: Path, columns: Sequence[str], changed: int) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(parse_lines(path, None)):
        wrong = [name for name in columns if not is_text(row.get(name))]
        error = row.get(ROW_ERROR) or (
            f"the {wrong[0]} of row {number} is {row.get(wrong[0])!r}, not a text" if wrong else None
        )
        texts = {name: None if wrong else row[name] for name in columns}
        yield texts | {LINE: json.dumps(row), ROW_ERROR: error}


def is_text(value: Any) -> bool:
    """Whether a value is a string of characters; JSON has strings with halves of surrogate pairs, which are none."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def parse_lines(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Each line of a file of JSON lines, as a mapping; of one that is none, a mapping that says why."""
    with opened(path, "rb") as file:
        try:
            lines = (line for text in file for line in text.removeprefix(BOM_UTF8).splitlines() if line.strip())
            for number, line in enumerate(islice(lines, limit)):
                try:
                    row = json.loads(line.decode("utf-8"))
                    yield row if isinstance(row, dict) else {ROW_ERROR: f"row {number} is no JSON object"}
                except ValueError as error:
                    yield {ROW_ERROR: f"row {number} is not JSON ({error})"}
        except (OSError, EOFError, zlib.error) as error:
            yield {ROW_ERROR: f"the rest cannot be read ({error})"}


def _load_from_hub(name: str, split: str) -> Dataset:
    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # offline, unknown, gated, no such split: each its own class
        raise FileNotFoundError(
            f"{name} is neither a file nor a data set that can be loaded from the Hub: {first_line(error)}"
        ) from error
