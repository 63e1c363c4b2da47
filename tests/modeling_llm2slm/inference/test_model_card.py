"""The model card: what the Hub reads of it comes back, and what people read of it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.model_card import MARK, CardDetails, eval_results, model_card, write_model_card
from tests.support.common import build_model, build_parts


EVALUATION = {
    "model": "/runs/model",
    "data": "test.jsonl",
    "examples": 1000,
    "scores": {"bleu": 36.517, "chrf": 60.02, "rougeL": 55.5, "exact_match": 3.0},
    "signatures": {"bleu": "nrefs:1|case:mixed"},
    "speed": {"ms_per_output": 64.2, "ms_per_token": 3.73, "tokens_per_output": 17.2, "timed_outputs": 50},
    "device": "cpu",
    "threads": 1,
    "dtype": "float32",
}
ON_THE_HUB = {**EVALUATION, "data": "user/pairs:en-de", "split": "test"}
LLM = {**EVALUATION, "model": "/runs/t5", "speed": {**EVALUATION["speed"], "ms_per_output": 80.2}}
TRAINING = {
    "recipe": {
        "model": "/home/me/start",
        "train_data": "user/pairs:en-de",
        "output_dir": "/home/me/out",
        "max_steps": 9,
    },
    "steps": 9,
    "seconds": 12.3,
    "trained_parameters": 1234,
}


@pytest.fixture
def model() -> LLM2SLMForConditionalGeneration:
    model = build_model()
    model.config.llm_source = {
        "name_or_path": "google-t5/t5-large",
        "revision": "0123456789abcdef",
        "fingerprint": "f",
    }
    model.config.slm_source = {"name_or_path": "openai-community/gpt2", "revision": None}
    return model


@pytest.fixture
def card(model) -> ModelCard:
    details = CardDetails(
        language=["en", "de"], license="apache-2.0", pipeline_tag="translation", training=TRAINING,
        evaluations=[EVALUATION, ON_THE_HUB], compared=[LLM], tags=["mine"],
    )  # fmt: skip
    return model_card(model, "user/translator", details)


def test_the_metadata_is_what_the_hub_reads(card, tmp_path):
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert isinstance(data, ModelCardData)
    assert data.to_dict() == card.data.to_dict()
    assert data.base_model == ["google-t5/t5-large", "openai-community/gpt2"]
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert (data.language, data.license, data.library_name) == (["en", "de"], "apache-2.0", "transformers")
    assert (data.pipeline_tag, data.datasets) == ("translation", ["user/pairs"])
    assert {"llm2slm", "mine"} <= set(data.tags)


def test_the_model_index_comes_back(card):
    index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    name, results = model_index_to_eval_results(index)
    assert name == "translator"
    assert results == card.data.eval_results
    values = {result.metric_name: result.metric_value for result in results}
    assert values == {"BLEU": 36.52, "chrF": 60.02, "ROUGE-L": 55.5, "exact_match": 3.0}
    fields = ("dataset_type", "dataset_name", "dataset_config", "dataset_split")
    data = [tuple(getattr(result, field) for field in fields) for result in results[:: len(values)]]
    assert data == [("test.jsonl", "test.jsonl", None, None), ("user/pairs", "user/pairs:en-de", "en-de", "test")]
    assert {result.task_type for result in results} == {"translation"}
    assert results[0].metric_args == {"signature": "nrefs:1|case:mixed"}


def test_leaderboards_get_one_metric_of_data_sets_on_the_hub():
    plain = {**ON_THE_HUB, "data": "user/other", "signatures": {}}
    found = parse_eval_result_entries(yaml.safe_load(eval_results([EVALUATION, ON_THE_HUB, plain], "bleu")))
    assert found == [
        EvalResultEntry("user/pairs", "en-de", 36.52, notes="BLEU, split test, nrefs:1|case:mixed"),
        EvalResultEntry("user/other", "default", 36.52, notes="BLEU, split test"),
    ]
    for evaluations, metric in (([EVALUATION], "bleu"), ([ON_THE_HUB], "rouge1")):
        with pytest.raises(ValueError, match=f"No result has the metric '{metric}' on a data set of the Hub"):
            eval_results(evaluations, metric)


def test_the_text_holds_parts_training_scores_and_times(card):
    text = card.text
    for words in (
        "https://huggingface.co/google-t5/t5-large) at `0123456789ab`", 'fusion "add"', "| SLM |", "per token",
        "Languages: en, de.", "## Training", "max_steps: 9", "9 steps in 12 s", "nrefs:1|case:mixed",
        "| model | 64.2 | 3.73 | 17.2 |", "| t5 | 80.2 |", "The licences of the parts apply to the whole",
        'name = "user/translator"', "arxiv.org/abs/2402.16844",
    ):  # fmt: skip
        assert words in text, words
    assert "/home/me" not in text
    assert "0.000" not in text.partition("## Parts")[2].partition("\n\n")[0]


def test_no_token_is_published(model):
    recipe = {**TRAINING["recipe"], "hub_token": "hf_secret", "push_to_hub_token": "hf_secret"}  # of an old report
    text = model_card(model, "model", CardDetails(training={**TRAINING, "recipe": recipe})).text
    assert "max_steps: 9" in text
    assert "token:" not in text
    assert "hf_secret" not in text


def test_a_card_of_a_model_of_unknown_origin_has_no_empty_sections():
    text = str(model_card(build_model(), "model"))
    assert ModelCard(text).data.base_model is None
    assert "base_model" not in text
    assert "## Scores" not in text
    assert "## Times" not in text
    assert "new, trained from scratch" in text


def test_a_config_file_is_not_a_base_model(model):
    model.config.slm_source = {"name_or_path": "gpt2.json"}
    card = model_card(model, "model")
    assert card.data.base_model == ["google-t5/t5-large"]
    assert "| SLM | new, trained from scratch | trained |" in card.text
    assert "SLM: see the licence of its base model" not in card.text
    assert "gpt2.json" not in card.text


def test_licences_come_from_the_cards_of_the_parts(tmp_path):
    parts = build_parts()
    for name, part in (("llm", parts.llm), ("slm", parts.slm)):
        part.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n# A part\n")
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(tmp_path / "llm", tmp_path / "slm")
    card = model_card(model, "model")
    assert card.data.license == "mit"
    assert "LLM: its card says `mit`" in card.text
    (tmp_path / "slm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    card = model_card(model, "model")
    assert card.data.license is None
    assert "SLM: its card says `apache-2.0`" in card.text
    (tmp_path / "slm" / "README.md").write_text("---\n: [broken\n---\n")
    assert "SLM: see the licence" in model_card(model, "model").text


def test_a_card_by_hand_stays_and_one_of_ours_is_written_again(model, tmp_path):
    for earlier, kept in (("# Mine\n", True), (f"---\n---\n{MARK}\nold", False), ("", False)):
        (tmp_path / "README.md").write_text(earlier)
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert (text == earlier) is kept
        assert (MARK in text) is not kept


def test_a_broken_earlier_card_does_not_stop_a_save(model, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe broken")
    write_model_card(model, tmp_path, tmp_path, name="model")
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe broken"
    assert Path(tmp_path).is_dir()
