"""Batches of rows, as Ray Data gives them to the callable."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from modeling_llm2slm import GenerateBatches
from modeling_llm2slm.settings import GenerateFileSettings
from tests.support.checkpoints import PROMPTS

from .conftest import MAX_NEW_TOKENS, REPEATED


def batch(prompts: list[object]) -> dict[str, np.ndarray]:
    values = np.empty(len(prompts), dtype=object)
    values[:] = prompts
    return {"id": np.arange(len(prompts)), "prompt": values}


def test_a_batch_gets_a_column_of_outputs(composite: str, alone: list[str]) -> None:
    settings = GenerateFileSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=4, column="output")
    rows = GenerateBatches(composite, settings)(batch(list(REPEATED)))
    assert rows["output"].tolist() == alone
    assert rows["prompt"].tolist() == REPEATED
    assert rows["id"].tolist() == list(range(len(REPEATED)))


def test_samples_do_not_depend_on_the_order_of_the_rows(composite: str) -> None:
    settings = GenerateFileSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=1, sample=True, temperature=2.0, seed=3)
    generate = GenerateBatches(composite, settings)
    prompts = PROMPTS[:4]
    there, back = (generate(batch(rows))["model_output"].tolist() for rows in (list(prompts), list(prompts[::-1])))
    assert there == back[::-1]
    assert len(set(there)) > 1


def test_bad_rows_are_refused_or_left_out(composite: str, alone: list[str], caplog: pytest.LogCaptureFixture) -> None:
    rows = batch([REPEATED[0], None, REPEATED[1], 7])
    settings = GenerateFileSettings(max_new_tokens=MAX_NEW_TOKENS)
    with pytest.raises(
        ValueError, match=r"A batch: the prompt of row 1 is None, not text\. There are 2 bad rows: 1, 3"
    ):
        GenerateBatches(composite, settings)(rows)
    generate = GenerateBatches(composite, GenerateFileSettings(max_new_tokens=MAX_NEW_TOKENS, skip_bad_rows=True))
    with caplog.at_level(logging.WARNING):
        found = generate(rows)
    assert (found["id"].tolist(), found["model_output"].tolist()) == ([0, 2], alone[:2])
    assert "2 bad rows were skipped" in caplog.text
    assert generate(batch([None]))["model_output"].tolist() == []
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        generate({"text": np.array(["src1"])})
