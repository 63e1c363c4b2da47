"""Metrics equal those of sacrebleu and rouge-score."""

from __future__ import annotations

import pytest
import sacrebleu

from modeling_llm2slm.evaluation.metrics import SCORERS, score, score_with_signatures
from modeling_llm2slm.settings import METRICS


REFERENCES = ["Ein Mann schläft auf einem Sofa.", "Zwei Hunde spielen im Schnee."]
OUTPUTS = ["Ein Mann schläft auf dem Sofa.", "Zwei Hunde spielen im Schnee. "]


def test_every_metric_has_a_scorer() -> None:
    assert list(SCORERS) == list(METRICS)


def test_equal_texts_score_100() -> None:
    assert score(REFERENCES, REFERENCES) == pytest.approx(dict.fromkeys(METRICS, 100.0))


def test_bleu_and_chrf_equal_those_of_sacrebleu() -> None:
    scores = score(OUTPUTS, REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score
    assert 0 < scores["bleu"] < 100


def test_rouge_is_the_mean_over_examples() -> None:
    scores = score(["a b c d", "x"], ["a b e f", "y"], ["rouge1", "rouge2", "rougeL"])
    assert scores == pytest.approx({"rouge1": 25, "rouge2": 100 / 6, "rougeL": 25})


def test_exact_match_ignores_surrounding_white_space() -> None:
    assert score(OUTPUTS, REFERENCES, ["exact_match"]) == {"exact_match": 50}


def test_score_computes_only_the_requested_metrics() -> None:
    assert list(score(OUTPUTS, REFERENCES, ["chrf"])) == ["chrf"]


def test_signatures_say_how_metrics_were_computed() -> None:
    _, signatures = score_with_signatures(OUTPUTS, REFERENCES)
    assert signatures["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")
    assert all(signatures[name].startswith("rouge-score 0.") for name in ("rouge1", "rouge2", "rougeL"))


def test_a_different_number_of_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        score(OUTPUTS[:1], REFERENCES, ["exact_match"])
