"""`compare` scores a model against the LLM, with or without references, and finds the rows that agree least."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modeling_llm2slm.evaluation.agreement import compare, least_agreement
from modeling_llm2slm.evaluation.metrics import score
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import EvaluateSettings
from tests.support.checkpoints import PAIRS, PROMPTS, write_checkpoint, write_pairs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextToText]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: TextToText.from_pretrained(write_checkpoint(kind, folder)) for kind in ("llm2slm", "llm")}


def test_agreement_is_the_score_against_the_llm(models: dict[str, TextToText], tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    settings = EvaluateSettings(timed_outputs=2, worst=3, max_new_tokens=6)
    result = compare(models["llm2slm"], models["llm"], data, settings)
    outputs, expected = (models[kind].generate(PROMPTS, max_new_tokens=6) for kind in ("llm2slm", "llm"))
    references = [pair["target"] for pair in PAIRS]
    assert result["agreement"] == score(outputs, expected)
    assert result["scores"] == score(outputs, references)
    assert result["llm_scores"] == score(expected, references)
    assert result["speed_up"] == result["llm_speed"]["ms_per_output"] / result["speed"]["ms_per_output"]
    assert len(result["worst"]) == 3
    assert json.loads(json.dumps(result)) == result


def test_prompts_without_references_are_compared(models: dict[str, TextToText], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    settings = EvaluateSettings(timed_outputs=0, max_new_tokens=4)
    result = compare(models["llm"], models["llm"], tmp_path / "prompts.txt", settings)
    assert result["agreement"]["exact_match"] == 100
    assert (result["scores"], result["llm_scores"], result["speed"], result["speed_up"]) == ({}, {}, {}, None)
    assert result["worst"] == []


def test_references_of_only_some_rows_are_not_used(
    models: dict[str, TextToText], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [PAIRS[0] | {"target": None}, *PAIRS[1:3]]
    options = {"timed_outputs": 0, "worst": 9, "max_new_tokens": 6}
    result = compare(
        models["llm2slm"], models["llm"], write_pairs(tmp_path / "some.jsonl", rows), EvaluateSettings(**options)
    )
    assert (result["prompts"], result["scores"], result["llm_scores"]) == (3, {}, {})
    assert "1 of 3 rows have no text in 'target': references are not used" in caplog.text
    data = write_pairs(tmp_path / "bad.jsonl", [*rows, {"prompt": 7, "target": "x"}, PAIRS[3]])
    result = compare(models["llm2slm"], models["llm"], data, EvaluateSettings(skip_bad_rows=True, **options))
    numbers = {1: PROMPTS[1], 2: PROMPTS[2], 4: PROMPTS[3]}
    assert result["prompts"] == 3
    assert result["scores"]["bleu"] >= 0
    assert {row["row"]: row["prompt"] for row in result["worst"]} == numbers


def test_least_agreement_comes_first() -> None:
    outputs, expected = ["ein Hund", "eine Katze", "Maus"], ["ein Hund ", "eine Ratte", "xyz"]
    rows = least_agreement([0, 1, 5], ["p", "q", "r"], outputs, expected, 3)
    assert [row["row"] for row in rows] == [5, 1]
    assert rows[0] | {"chrf": 0.0} == {"row": 5, "prompt": "r", "output": "Maus", "llm_output": "xyz", "chrf": 0.0}
    assert 0 <= rows[0]["chrf"] < rows[1]["chrf"] < 100


def test_a_repeated_prompt_is_listed_once() -> None:
    rows = least_agreement([0, 1, 2], ["p", "p", "q"], ["x", "x", "ein Hund"], ["Maus", "Maus", "eine Katze"], 2)
    assert [row["row"] for row in rows] == [0, 2]


def test_a_missing_target_column_is_an_error(models: dict[str, TextToText], tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="has no column 'refs' to score against"):
        compare(models["llm2slm"], models["llm"], data, EvaluateSettings(target_column="refs"))
