"""`evaluate` scores and times every kind of checkpoint, and skips rows only on request."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.evaluation.agreement import compare
from modeling_llm2slm.evaluation.evaluate import evaluate
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import METRICS, EvaluateSettings
from tests.support.checkpoints import KINDS, PAIRS, PROMPTS, sample_by_default, write_checkpoint, write_pairs


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_is_scored_and_timed(kind: str, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    settings = EvaluateSettings(limit=5, timed_outputs=2, max_new_tokens=6)
    result = evaluate(write_checkpoint(kind, tmp_path), data, settings)
    assert list(result["scores"]) == list(METRICS)
    assert (result["examples"], result["speed"]["timed_outputs"]) == (5, 2)
    assert result["speed"]["ms_per_output"] > 0
    assert result["generation"] == {"do_sample": False, "num_beams": 1, "max_new_tokens": 6}
    assert json.loads(json.dumps(result)) == result


def test_a_loaded_model_is_scored_without_timing(tmp_path: Path) -> None:
    model = TextToText.from_pretrained(write_checkpoint("slm", tmp_path))
    settings = EvaluateSettings(timed_outputs=0, max_new_tokens=4)
    assert evaluate(model, write_pairs(tmp_path / "pairs.jsonl"), settings)["speed"] == {}


@pytest.mark.parametrize("against", [False, True])
def test_nothing_is_sampled_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: bool) -> None:
    model = write_checkpoint("llm", tmp_path)
    greedy = TextToText.from_pretrained(model).generate(PROMPTS, max_new_tokens=5)
    sample_by_default(model)
    generate, outputs = TextToText.generate, []

    def recording(*args: Any, **kwargs: Any) -> list[str]:
        outputs.append(generate(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(TextToText, "generate", recording)
    data, settings = write_pairs(tmp_path / "pairs.jsonl"), EvaluateSettings(timed_outputs=0, max_new_tokens=5)
    if against:
        compare(model, model, data, settings)
    else:
        evaluate(model, data, settings)
    assert outputs == [greedy] * (1 + against)


@pytest.mark.parametrize("against", [False, True])
def test_rows_without_text_or_too_long_are_skipped_on_request(tmp_path: Path, against: bool) -> None:
    bad = [{"prompt": "src1", "target": None}, {"prompt": " ".join(["src1"] * 70), "target": "src2"}]
    data, model = write_pairs(tmp_path / "pairs.jsonl", [*bad, *PAIRS]), write_checkpoint("llm2slm", tmp_path)
    settings = EvaluateSettings(timed_outputs=0, max_new_tokens=3)
    skipping = EvaluateSettings(timed_outputs=0, max_new_tokens=3, skip_bad_rows=True)
    score_all = partial(compare, model, model) if against else partial(evaluate, model)
    # Without a reference for every row, nothing is compared with references.
    first = "The prompt has 71 tokens" if against else "target of row 0 is None.* skip it with --skip-bad-rows"
    with pytest.raises(ValueError, match=first):
        score_all(data, settings)
    assert score_all(data, skipping)["prompts" if against else "examples"] == len(PAIRS)
    with pytest.raises(ValueError, match=r"no row can be used; row \d is too long: The prompt has 71 tokens"):
        score_all(write_pairs(tmp_path / "long.jsonl", bad), skipping)
