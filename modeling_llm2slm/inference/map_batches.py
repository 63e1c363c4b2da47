"""Generation as a stateful callable, which loads a model once and then takes batch after batch: for Ray Data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..data.bad_rows import check_columns, report_bad_rows, text_problem
from ..data.conversations import read_conversations, sources_of
from ..settings import GenerateFileSettings, check_generate_arguments
from .batching import BatchLimits, OutputId, PromptTable
from .text_to_text import Features, TextToText, is_sampled


class GenerateRows:
    """
    Generates for prompts, each with the number of its row, which seeds sampling.

    Args:
        model: A checkpoint of any kind, a folder or a name on the Hub. It must exist where the callable is made.
        settings: How to load the model and to generate.
        generate_kwargs: Arguments of `model.generate()`, in addition to `settings.generate_kwargs()`.
    """

    def __init__(
        self,
        model: str,
        settings: GenerateFileSettings = GenerateFileSettings(),  # noqa: B008 - immutable
        **generate_kwargs: Any,
    ):
        check_generate_arguments(generate_kwargs)
        self.settings = settings
        self.text_to_text = TextToText.from_pretrained(model, **load_options(settings))
        self.generate_kwargs = self.text_to_text.with_limit({**settings.generate_kwargs(), **generate_kwargs})

    def __call__(self, item: tuple[Sequence[str], Sequence[int]]) -> list[list[int]]:
        """Return the token ids of the output of each row, the end token included."""
        prompts, numbers = item
        table = PromptTable(is_sampled(self.text_to_text, self.generate_kwargs))
        table.add(prompts, partial(lengths_of, self.text_to_text, prompts))
        prompt_of = dict(zip(numbers, prompts, strict=True))
        table.rows = [numbers[row] for row in table.rows]

        def features_of(rows: list[int]) -> Features:
            return self.text_to_text.features([prompt_of[row] for row in rows])

        limits = BatchLimits(self.settings.batch_size, self.settings.batch_tokens)
        options = {"overlap": self.settings.overlap, "seed": self.settings.seed, **self.generate_kwargs}
        outputs: dict[OutputId, list[int]] = {}
        for ids, tokens in self.text_to_text.generate_batches(
            table, table.batches(limits), features_of, limits, **options
        ):
            outputs.update(zip(ids, tokens, strict=True))
        return [outputs[one] for one in table.outputs]


class GenerateBatches:
    """
    Adds a column of outputs to batches of rows: a stateful callable for `ray.data.Dataset.map_batches`.

    Example:

    ```python
    import ray
    from modeling_llm2slm import GenerateBatches

    rows = ray.data.read_parquet("s3://bucket/prompts/")
    model = {"model": "user/model"}
    rows = rows.map_batches(GenerateBatches, fn_constructor_kwargs=model, batch_size=128, concurrency=2)
    rows.write_parquet("s3://bucket/outputs/")
    ```

    Args:
        model: A checkpoint of any kind, a folder or a name on the Hub. Each worker loads it.
        settings: How to load the model, which columns to read and write, and how to generate. With a `seed`, the
            outputs of a batch depend on its prompts.
        generate_kwargs: Arguments of `model.generate()`, in addition to `settings.generate_kwargs()`.
    """

    def __init__(
        self,
        model: str,
        settings: GenerateFileSettings = GenerateFileSettings(),  # noqa: B008 - immutable
        **generate_kwargs: Any,
    ):
        self.settings = settings
        self._generate = GenerateRows(model, settings, **generate_kwargs)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """
        Return the columns of a batch, and the outputs in the column `settings.column`.

        Args:
            batch: Columns of values. The prompts are texts or conversations.

        Raises:
            ValueError: If a row holds no prompt, or one that is too long. With `settings.skip_bad_rows`, the row is
                left out, with a warning.
        """
        columns = {name: np.asarray(values) for name, values in batch.items()}
        prompts, problems = self._read({name: values.tolist() for name, values in columns.items()})
        if problems:
            report_bad_rows("A batch", problems, self.settings.skip_bad_rows)
        good = [row for row in range(len(prompts)) if row not in problems]
        kept = [prompts[row] for row in good]
        tokens = self._generate((kept, [_number_of(prompt) for prompt in kept])) if kept else []
        texts = self._generate.text_to_text.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []
        return {
            **{name: values[good] for name, values in columns.items()},
            self.settings.column: np.array(texts, object),
        }

    def _read(self, columns: Mapping[str, list[Any]]) -> tuple[list[Any], dict[int, str]]:
        """Return the prompt of each row, and the problem of each row without one that can be used."""
        column, text_to_text = self.settings.prompt_column, self._generate.text_to_text
        sources = sources_of([column], columns)
        check_columns("A batch", list(sources.values()), list(columns))
        prompts, problems = [], {}
        for number, values in enumerate(zip(*columns.values(), strict=True)):
            row, problem = read_conversations(dict(zip(columns, values, strict=True)), sources, number)
            problem = problem or text_problem(row, [column], number)
            if problem is None:
                (length,) = lengths_of(text_to_text, [row[column]], [0])
                limit = self._generate.generate_kwargs.get("max_new_tokens", 0)
                problem = text_to_text.position_problem(length, limit)
                problem = problem and f"row {number} is too long: {problem}"
            if problem is not None:
                problems[number] = problem
            prompts.append(row.get(column))
        return prompts, problems


def _number_of(prompt: str) -> int:
    """Return a number for a prompt in place of its row number, which batches of Ray Data do not have."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest())


def load_options(settings: GenerateFileSettings) -> dict[str, Any]:
    """Return the options of [`TextToText.from_pretrained`] that are in the settings."""
    return {
        name: getattr(settings, name)
        for name in ("engine", "device", "prompt_max_length", "quantize", "dtype", "allow_nonfinite")
    }


def lengths_of(text_to_text: TextToText, texts: Sequence[str], indices: Sequence[int]) -> list[int]:
    """Return the lengths, in tokens, of the texts with these indices."""
    if not indices:
        return []
    return [len(ids) for ids in text_to_text.features([texts[index] for index in indices])["input_ids"]]
