"""Data for a training: the examples of a recipe as token ids, indexed or streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import Seq2SeqTrainingArguments

from ..data.bad_rows import good_rows
from ..data.loading import load_examples
from ..data.order import lengths
from ..data.streaming import StreamedFeatures, StreamSettings
from ..inference.text_to_text import TextToText
from ..settings import DataSettings
from .batches import data_seed, effective_batch_size
from .recipe import Recipe


FEATURES_VERSION = 2  # of the features that `datasets` caches: increase it whenever the same examples give others
ROWS_AT_ONCE = 10_000  # rows per call of the tokenizers; truncated texts are reported this often


@dataclass
class TrainingData:
    """
    What a Trainer reads.

    Args:
        train: Features to train on: a [`~datasets.Dataset`] or a [`StreamedFeatures`].
        validation: Features to validate on; `None` without validation data.
        validation_examples: The examples (`prompt`, `target`) behind `validation`.
    """

    train: Any
    validation: Dataset | None = None
    validation_examples: Dataset | None = None


def training_data(recipe: Recipe, arguments: Seq2SeqTrainingArguments, text_to_text: TextToText) -> TrainingData:
    """Return the features of a recipe's data. The main process tokenizes first; others read what it cached."""
    with arguments.main_process_first(desc="reading data"):
        validation = validation_examples = None
        if recipe.validation_data:
            validation_examples, validation = indexed_features(recipe, text_to_text, validation=True)
        if recipe.streaming:
            return TrainingData(streamed_features(recipe, arguments, text_to_text), validation, validation_examples)
        _, train = indexed_features(recipe, text_to_text)
        return TrainingData(train, validation, validation_examples)


def indexed_features(recipe: Recipe, text_to_text: TextToText, validation: bool = False) -> tuple[Dataset, Dataset]:
    """
    Return the examples of a recipe's training or validation data, and their features. `datasets` caches both on disk.

    Examples that are too long for the model are refused, or skipped by `skip_bad_rows`: those whose prompt and target
    exceed its max positions, and, where validation generates outputs, those whose prompt and longest output do.

    Raises:
        ValueError: If a row is bad and `skip_bad_rows` is not set, or no row is left.
    """
    source = (recipe.validation_data or "") if validation else recipe.train_data
    settings = DataSettings(
        prompt_column=recipe.prompt_column,
        split=recipe.validation_split if validation else recipe.train_split,
        limit=recipe.validation_samples if validation else recipe.train_samples,
        skip_bad_rows=recipe.skip_bad_rows,
    )
    targets = recipe.target_column[:1] if validation else recipe.target_column
    examples = load_examples(source, settings, targets, number_rows=True)
    features = _tokenized(examples, text_to_text, recipe.preprocessing_num_workers)
    problems = {index: problem for index, problem in enumerate(features["problem"]) if problem}
    if validation and recipe.metric != "loss":
        longest = text_to_text.with_limit(recipe.generation).get("max_new_tokens", 0)
        problems = dict(sorted((_output_problems(examples, text_to_text, longest) | problems).items()))
    if problems:
        kept = good_rows(source, examples["row"][:], problems, recipe.skip_bad_rows)
        examples, features = examples.select(kept), features.select(kept)
    return examples, features.remove_columns("problem")


def _tokenized(examples: Dataset, text_to_text: TextToText, workers: int | None) -> Dataset:
    """Return the features of examples, with their `length` and, where the model cannot read one, the `problem`."""
    reader = text_to_text.without_model()  # worker processes need no weights

    def features(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = reader.features(rows["prompt"], rows["target"])
        problems = [problem or "" for problem in reader.problems(found)]
        return {**found, "length": lengths(found), "problem": problems}

    return examples.map(
        features,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=examples.column_names,
        num_proc=workers,
        new_fingerprint=Hasher.hash([examples._fingerprint, text_to_text.fingerprint(), FEATURES_VERSION]),
    )


def _output_problems(examples: Dataset, text_to_text: TextToText, longest: int) -> dict[int, str]:
    """Return, by index, why a prompt with an output of up to `longest` tokens exceeds the model's max positions."""
    problems = {}
    for index, ids in enumerate(text_to_text.features(examples["prompt"][:])["input_ids"]):
        if problem := text_to_text.position_problem(len(ids), longest):
            problems[index] = f"is too long to generate an output: {problem}"
    return problems


def streamed_features(
    recipe: Recipe, arguments: Seq2SeqTrainingArguments, text_to_text: TextToText
) -> StreamedFeatures:
    """Return the features of a recipe's training data as a stream, which tokenizes rows while the model trains."""
    reader = text_to_text.without_model()
    settings = StreamSettings(
        prompt_column=recipe.prompt_column,
        target_columns=recipe.target_column,
        split=recipe.train_split,
        batch_size=effective_batch_size(arguments),
        buffer=recipe.shuffle_buffer,
        group_by_length=arguments.train_sampling_strategy == "group_by_length",
        seed=data_seed(arguments),
        limit=recipe.train_samples,
        skip_bad_rows=recipe.skip_bad_rows,
    )
    return StreamedFeatures(recipe.train_data, reader.features, reader.problems, settings)
