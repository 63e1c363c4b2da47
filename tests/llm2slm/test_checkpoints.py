"""Commands on one checkpoint: `build`, `info`, `card`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import write_checkpoint, write_parts
from tests.support.commands import run


def test_info_shows_the_dtype_in_the_files(capsys):
    assert run("info", "examples/demo/llm") == 0
    assert "bfloat16" in capsys.readouterr().out


def test_two_configs_make_an_llm2slm_checkpoint(tmp_path, capsys):
    llm, slm, tokenizer = write_parts(tmp_path)
    assert run("build", tmp_path / "new", "--llm", llm, "--slm", slm, "--llm-tokenizer", tokenizer) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
    assert isinstance(model, LLM2SLMForConditionalGeneration)
    assert (model.config.fusion, model.config.shared_tokenizer) == ("add", True)
    assert "projector" in capsys.readouterr().out


def test_pretrained_parts_are_composed_unchanged(tmp_path, capsys):
    llm, slm = (write_checkpoint(kind, tmp_path) for kind in ("llm", "slm"))
    lengths = ("--prompt-max-length", 7, "--target-max-length", 9, "--max-new-tokens", 5, "--max-shard-size", "20KB")
    assert run("build", tmp_path / "new", "--llm", llm, "--slm", slm, "--fusion", "replace", *lengths) == 0
    assert "weights compared" in capsys.readouterr().out
    built = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
    assert built.config.fusion == "replace"
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert (processor.prompt_max_length, processor.target_max_length) == (7, 9)
    assert built.generation_config.max_new_tokens == 5
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1
    for path, part in ((llm, built.encoder.llm), (slm, built.decoder)):
        weights = TextToText.from_pretrained(path).model.state_dict()
        assert all(bool((tensor == weights[name]).all()) for name, tensor in part.state_dict().items())


def test_a_preset_makes_a_checkpoint(tmp_path):
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    *_, tokenizer = write_parts(tmp_path)
    assert run("build", tmp_path / "new", "--preset", "tiny", "--llm-tokenizer", tokenizer) == 0
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new").config.model_type == "llm2slm"


def test_a_folder_is_replaced_only_on_request(tmp_path, capsys):
    _, slm, tokenizer = write_parts(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    words = ("build", tmp_path / "new", "--slm", slm, "--slm-tokenizer", tokenizer)
    assert run(*words) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0
    assert not (tmp_path / "new" / "mine").exists()


def test_parts_that_do_not_load_are_errors_of_one_sentence(tmp_path, capsys):
    """An unknown dtype, and an LLM whose file is truncated."""
    llm, slm, tokenizer = write_parts(tmp_path)
    assert run("build", tmp_path / "llm", "--llm", llm, "--llm-tokenizer", tokenizer) == 0
    capsys.readouterr()
    start = ("build", tmp_path / "out", "--llm", tmp_path / "llm", "--slm", slm, "--slm-tokenizer", tokenizer)
    assert run(*start, "--encoder-dtype", "bf17") == 1
    assert "`encoder_dtype` is 'bf17', but it must be a float such as bfloat16" in capsys.readouterr().err
    weights = tmp_path / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(*start) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_names_the_parts(composite, capsys):
    assert run("info", composite) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("LLM", "projector", "SLM", "used for each token"))


def test_a_corrupt_checkpoint_is_an_error_of_one_sentence(tmp_path, capsys):
    path = Path(write_checkpoint("slm", tmp_path))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    assert run("info", path) == 1
    assert capsys.readouterr().err.startswith(f"Error: {path} cannot be loaded")


def test_card_writes_scores_and_keeps_a_card_written_by_hand(composite, tmp_path, capsys):
    model = Path(shutil.copytree(composite, tmp_path / "model"))
    result = {"data": "test.jsonl", "examples": 3, "scores": {"bleu": 12.345}, "signatures": {"bleu": "sig"}}
    (tmp_path / "metrics.json").write_text(json.dumps(result))
    words = ("card", model, "--evaluation", tmp_path / "metrics.json", "--language", "de", "--task", "translation")
    assert run(*words, "--license", "apache-2.0") == 0
    text = (model / "README.md").read_text()
    assert "12.35" in text
    assert "license: apache-2.0" in text
    assert "pipeline_tag: translation" in text
    assert run(*words, "--leaderboard", "bleu") == 1
    assert "No result has the metric 'bleu' on a data set of the Hub" in capsys.readouterr().err
    assert not (model / ".eval_results").exists()
    (tmp_path / "hub.json").write_text(json.dumps({**result, "data": "user/pairs", "split": "test"}))
    assert run(*words, "--evaluation", tmp_path / "hub.json", "--leaderboard", "bleu") == 0
    assert "value: 12.35" in (model / ".eval_results" / "llm2slm.yaml").read_text()
    (model / "README.md").write_text("my own")
    assert run(*words) == 1
    assert "was written by hand" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text("[]")
    assert run(*words) == 1
    assert "does not hold a result" in capsys.readouterr().err
    assert run("card", write_checkpoint("slm", tmp_path)) == 1
    assert "is not an LLM-to-SLM checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "does not hold the report of a training"),
        ("{", "truncated or corrupted"),
        ('{"steps": "x"}', "steps is 'x'"),
    ],
)
def test_a_damaged_report_of_a_training_is_named(composite, tmp_path, capsys, content, message):
    model = Path(shutil.copytree(composite, tmp_path / "model"))
    (model / "training.json").write_text(content)
    for command in ("info", "card"):
        assert run(command, model) == 1
        error = capsys.readouterr().err
        assert "training.json" in error
        assert message in error


@pytest.mark.parametrize("result", [{"scores": {"bleu": "high"}}, {"scores": [1]}, {"speed": {"ms_per_output": None}}])
def test_a_damaged_result_of_an_evaluation_is_named(composite, tmp_path, capsys, result):
    (tmp_path / "metrics.json").write_text(json.dumps(result))
    model = Path(shutil.copytree(composite, tmp_path / "model"))
    assert run("card", model, "--evaluation", tmp_path / "metrics.json") == 1
    assert f"metrics.json cannot be read: {next(iter(result))} is" in capsys.readouterr().err
