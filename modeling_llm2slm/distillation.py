"""Sequence-level distillation: the LLM writes the answers that the small model is trained on (Kim and Rush, 2016)."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from datasets import Dataset

from .data import load_prompts, write_aside
from .encoding import processes, share
from .state_store import weights_fingerprint
from .text_to_text import DecoderOnlyTextToText, TextToText


ANSWER_COLUMN = "llm_answer"


def distill(
    llm: str | Path,
    data: str | Path,
    output: str | Path,
    prompt_column: str = "prompt",
    *,
    column: str = ANSWER_COLUMN,
    split: str = "train",
    limit: int | None = None,
    prompt_max_length: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **generate_kwargs: Any,
) -> int:
    """
    Has an LLM answer every prompt of some data, and writes the data with these answers in a column of their own.

    Answers are kept in `<output>.part` as they come, and a run that was killed goes on from there. Prompts of similar
    length are answered together, the longest first; a prompt that occurs twice is answered once. Where the environment
    has `RANK` and `WORLD_SIZE` (`torchrun`), each process answers its part, and the last to finish writes the output.

    Args:
        llm: The checkpoint of an encoder-decoder, a folder or a name on the Hub.
        data: See [`load_prompts`].
        output: A file of JSON lines, `.jsonl` or `.jsonl.gz`.
        prompt_column: The column that holds what the model reads.
        column: The column for the answers; all others are kept as they are.
        split: The split to take from a data set on the Hub.
        limit: Answer only this many prompts, from the top.
        prompt_max_length: Prompts are cut to this many tokens (default: never).
        batch_size: How many prompts are answered at once.
        device: Where to compute.
        skip_bad_rows: See [`load_pairs`].
        overwrite: Replace an output, or what another run has left of one.
        progress: Called with the numbers of prompts done and in all.
        generate_kwargs: Arguments of `generate()`, such as `num_beams` and `max_new_tokens`.

    Returns:
        The number of rows.

    Raises:
        FileExistsError: If the output exists.
        ValueError: If the output is no `.jsonl`, the LLM is decoder-only, or what is left of a run was made by another
            LLM or other settings.
    """
    output = Path(output)
    if ".jsonl" not in output.suffixes or output.suffixes[-1] not in (".jsonl", ".gz"):
        raise ValueError(f"{output} is none of .jsonl and .jsonl.gz, which answers are written as.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Choose another file, or add --overwrite.")
    rows = load_prompts(data, prompt_column, split=split, limit=limit, skip_bad_rows=skip_bad_rows)
    text_to_text = TextToText.from_pretrained(llm, device=device, prompt_max_length=prompt_max_length)
    if isinstance(text_to_text, DecoderOnlyTextToText):
        raise ValueError(
            f"{llm} is decoder-only, and nothing says where its prompts end and its answers begin: take an "
            "encoder-decoder, or write its answers to a column of the data with the tools that it comes with."
        )
    settings = {"llm": weights_fingerprint(llm), "prompt_max_length": prompt_max_length, **generate_kwargs}
    rank, world = processes(overwrite)
    parts = AnswerParts(output, settings, rank, overwrite)
    first = _longest_first(text_to_text, rows)
    missing = [row for key, row in first.items() if key not in parts.answers]
    done = len(first) - len(missing)
    progress(done, len(first))
    # Shares are cut from all rows, not from what is missing: another process may have begun.
    todo = share(np.fromiter(first.values(), dtype=np.int64), batch_size, rank, world)
    todo = todo[np.isin(todo, missing)]
    with parts.path.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), batch_size):
            prompts = rows[todo[start : start + batch_size]]["prompt"]
            _keep(file, prompts, text_to_text.generate(prompts, batch_size, **generate_kwargs))
            done = min(done + world * len(prompts), len(first))
            progress(done, len(first))
    answers = parts.read_all()
    if len(answers) >= len(first):  # of several processes, only the last to finish finds all answers
        _write(output, rows, prompt_column, column, answers)
        parts.remove()
    return len(rows)


class AnswerParts:
    """
    Answers as they come, one file of JSON lines for each process, with the settings they were made with before them.

    Args:
        output: The file that is to hold all answers; parts lie beside it.
        settings: What an answer depends on beside its prompt.
        rank: The number of this process.
        overwrite: Remove what other settings have left.
    """

    def __init__(self, output: Path, settings: dict[str, Any], rank: int, overwrite: bool):
        self.output = output
        self.settings = json.loads(json.dumps(settings))
        self.path = output.with_name(f"{output.name}.part-{rank}" if rank else f"{output.name}.part")
        if overwrite:
            self.remove()
        self.answers = self.read_all()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            with write_aside(self.path) as temporary:
                temporary.write_text(json.dumps(self.settings) + "\n", encoding="utf-8")
        else:
            self._cut_torn_line()

    def read_all(self) -> dict[str, str]:
        """All answers so far, by the key of their prompt."""
        answers = {}
        for path in self._paths():
            lines = self._whole_lines(path)
            settings = next(lines, None)
            if settings != self.settings:
                raise ValueError(
                    f"{path} was left by a run with another LLM or other settings. Repeat these, remove the file, or "
                    "add --overwrite."
                )
            answers.update({line["prompt"]: line["answer"] for line in lines})
        return answers

    def remove(self) -> None:
        """Removes the files."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{self.output.name}.part*"))

    def _whole_lines(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a killed run may have written half a line
                    yield json.loads(line)

    def _cut_torn_line(self) -> None:
        with self.path.open("rb+") as file:
            end = 0
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
            file.truncate(end)


def _longest_first(text_to_text: TextToText, rows: Dataset) -> dict[str, int]:
    """The first row of each prompt by its key, the longest prompts first."""
    first: dict[str, int] = {}
    lengths: list[int] = []
    for batch in rows.select_columns(["prompt"]).iter(batch_size=1000):
        for row, prompt in enumerate(batch["prompt"], len(lengths)):
            first.setdefault(_key(prompt), row)
        lengths += map(len, text_to_text.features(batch["prompt"])["input_ids"])
    return dict(sorted(first.items(), key=lambda item: -lengths[item[1]]))


def _key(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


def _keep(file: IO[str], prompts: list[str], answers: list[str]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        file.write(json.dumps({"prompt": _key(prompt), "answer": answer}, ensure_ascii=False) + "\n")
    file.flush()


def _write(output: Path, rows: Dataset, prompt_column: str, column: str, answers: dict[str, str]) -> None:
    opener: Any = gzip.open if output.suffix == ".gz" else open
    with write_aside(output) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        for row in rows:
            prompt = row.pop("prompt")
            line = {prompt_column: prompt, **row, column: answers[_key(prompt)]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
