"""Scores that are sacrebleu's and rouge-score's, and times that belong to the answers."""

from __future__ import annotations

import json
from functools import partial

import pytest
import sacrebleu

from modeling_llm2slm import evaluation
from modeling_llm2slm.evaluation.agreement import compare
from modeling_llm2slm.evaluation.metrics import METRICS, evaluate, score, score_and_sign, time_generations
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import KINDS, PAIRS, PROMPTS, sample_by_default, write_checkpoint, write_pairs


REFERENCES = ["Ein Mann schläft auf einem Sofa.", "Zwei Hunde spielen im Schnee."]
ANSWERS = ["Ein Mann schläft auf dem Sofa.", "Zwei Hunde spielen im Schnee. "]


def test_equal_texts_score_full_marks():
    assert score(REFERENCES, REFERENCES) == pytest.approx(dict.fromkeys(METRICS, 100.0))


def test_bleu_and_chrf_are_those_of_sacrebleu():
    scores = score(ANSWERS, REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score
    assert 0 < scores["bleu"] < 100


def test_rouge_is_the_mean_over_pairs():
    scores = score(["a b c d", "x"], ["a b e f", "y"], ["rouge1", "rouge2", "rougeL"])
    assert scores == pytest.approx({"rouge1": 25, "rouge2": 100 / 6, "rougeL": 25})


def test_exact_match_ignores_white_space_around():
    assert score(ANSWERS, REFERENCES, ["exact_match"]) == {"exact_match": 50}


def test_only_what_is_asked_for_is_computed():
    assert list(score(ANSWERS, REFERENCES, ["chrf"])) == ["chrf"]


def test_signatures_say_how():
    _, signatures = score_and_sign(ANSWERS, REFERENCES)
    assert signatures["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")
    assert signatures["rouge"].startswith("rouge-score 0.")


def test_as_many_answers_as_references_are_needed():
    with pytest.raises(ValueError, match="longer"):
        score(ANSWERS[:1], REFERENCES, ["exact_match"])


@pytest.fixture(scope="module")
def slm(tmp_path_factory):
    return TextToText.from_pretrained(write_checkpoint("slm", tmp_path_factory.mktemp("slm")))


def test_time_is_divided_by_answers_and_by_tokens(slm, monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    speed = time_generations(slm, ["src1", "src2 src3"], min_new_tokens=4, max_new_tokens=4)
    assert speed == {"ms_per_output": 1500, "ms_per_token": 375, "tokens_per_answer": 4, "timed_outputs": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_scored_and_timed(kind, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    result = evaluate(write_checkpoint(kind, tmp_path), data, limit=5, timed_outputs=2, max_new_tokens=6)
    assert list(result["scores"]) == list(METRICS)
    assert (result["pairs"], result["speed"]["timed_outputs"]) == (5, 2)
    assert result["speed"]["ms_per_output"] > 0
    assert result["generation"] == {"do_sample": False, "max_new_tokens": 6}
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("against", [False, True])
def test_nothing_is_sampled_unless_asked_for(tmp_path, monkeypatch, against):
    model = write_checkpoint("llm", tmp_path)
    greedy = TextToText.from_pretrained(model).generate(PROMPTS, max_new_tokens=5)
    sample_by_default(model)
    generate, answers = TextToText.generate, []

    def noting(*args, **kwargs):
        answers.append(generate(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(TextToText, "generate", noting)
    data = write_pairs(tmp_path / "pairs.jsonl")
    if against:
        compare(model, model, data, timed_outputs=0, max_new_tokens=5)
    else:
        evaluate(model, data, timed_outputs=0, max_new_tokens=5)
    assert answers == [greedy] * (1 + against)


@pytest.mark.parametrize("against", [False, True])
def test_rows_without_text_and_rows_that_are_too_long_are_left_out_on_request(tmp_path, against):
    bad = [{"prompt": "src1", "target": None}, {"prompt": " ".join(["src1"] * 70), "target": "src2"}]
    data, model = write_pairs(tmp_path / "pairs.jsonl", [*bad, *PAIRS]), write_checkpoint("llm2slm", tmp_path)
    options = {"timed_outputs": 0, "max_new_tokens": 3}
    score_all = partial(compare, model, model) if against else partial(evaluate, model)
    first = "The prompt has 71 tokens" if against else "answer of row 0 is None.* leave them out with skip_bad_rows"
    with pytest.raises(ValueError, match=first):  # nothing is compared with references where some are missing
        score_all(data, **options)
    result = score_all(data, skip_bad_rows=True, **options)
    assert result["prompts" if against else "pairs"] == len(PAIRS)
    with pytest.raises(ValueError, match=r"no row can be used; The prompt has 71 tokens"):
        score_all(write_pairs(tmp_path / "long.jsonl", bad), skip_bad_rows=True, **options)


def test_a_model_already_loaded_is_scored_without_timing(slm, tmp_path):
    result = evaluate(slm, write_pairs(tmp_path / "pairs.jsonl"), timed_outputs=0, max_new_tokens=4)
    assert result["speed"] == {}
