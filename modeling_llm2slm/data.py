"""What goes in and out: pairs of texts, a tokenizer trained on them, and results that are never half there."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_dataset

from .files_llm2slm import write_aside as write_aside


if TYPE_CHECKING:
    from transformers import T5Tokenizer


# What `datasets` calls the format of a file, by the ending of its name (".gz" aside).
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_pairs(
    source: str | Path,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    *,
    split: str = "train",
    limit: int | None = None,
) -> Dataset:
    """
    Reads pairs of texts into a data set with the two columns `prompt` and `answer`.

    Args:
        source: A file (`.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`; the first four also as `.gz`), or the name of
            a data set on the Hub, with a configuration after a colon where it has several (`"user/name:config"`).
        prompt_column: The column that holds what the model reads.
        answer_column: The column that holds what the model shall write.
        split: The split to take from a data set on the Hub. A file is one split.
        limit: Keep only this many pairs, from the top.

    Raises:
        FileNotFoundError: If `source` is neither a file nor a data set that can be reached.
        ValueError: If the file cannot be read, is empty, lacks a column, or holds something that is not text.
    """
    dataset = _load(str(source), split)
    for column in (prompt_column, answer_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; it has {', '.join(map(repr, dataset.column_names))}. "
                "Name the columns with prompt_column and answer_column."
            )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    columns = {"prompt": dataset[prompt_column][:], "answer": dataset[answer_column][:]}
    if not columns["prompt"]:
        raise ValueError(f"{source} holds no pairs.")
    for name, texts in columns.items():
        _check_texts(source, name, texts)
    return Dataset.from_dict(columns)


def _load(source: str, split: str) -> Dataset:
    path = Path(source).expanduser()
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    file_format = FILE_FORMATS.get(suffixes[-1]) if suffixes else None
    if not path.is_file():
        if file_format is not None or source.count("/") > 1 or path.is_dir():
            raise FileNotFoundError(f"There is no data file {source}.")
        return _load_from_hub(source, split)
    if file_format is None:
        raise ValueError(f"{source} is none of {', '.join(FILE_FORMATS)}: the ending of the name tells the format.")
    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    try:
        return load_dataset(file_format, data_files=str(path), split="train", **options)
    except Exception as error:  # every reader has exceptions of its own
        reason = _first_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            raise ValueError(f"{source} holds no pairs.") from error
        raise ValueError(f"{source} cannot be read as {file_format}: {reason}") from error


def _load_from_hub(name: str, split: str) -> Dataset:
    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # offline, unknown, gated, no such split: each its own class
        raise FileNotFoundError(
            f"{name} is neither a file nor a data set that can be loaded from the Hub: {_first_line(error)}"
        ) from error


def _check_texts(source: str | Path, name: str, texts: list[Any]) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{source}: the {name} of row {row} is {text!r}, not a text.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6000) -> T5Tokenizer:
    """
    Trains a T5 tokenizer (Unigram; pad 0, end 1, unknown 2, no sentinels) on texts.

    Letters, digits and punctuation never share a token, and nothing is normalized: a text whose characters all occur
    in `texts` comes back as it was, but for runs of white space, which become one space.

    Args:
        texts: What to train on: the training split alone, in all of its languages.
        vocab_size: The number of tokens, the three special ones included.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    # T5 itself splits at white space only. A vocabulary that was trained on finer pieces keeps to them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return T5Tokenizer(vocab=_unigram_scores(tokenizer), extra_ids=0)


def _unigram_scores(tokenizer: Any) -> list[tuple[str, float]]:
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(token, score) for token, score in vocabulary]


def versions() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    names = ("accelerate", "datasets", "rouge-score", "sacrebleu", "tokenizers", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
