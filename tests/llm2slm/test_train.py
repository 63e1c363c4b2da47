"""Commands that train: `train` and `speedup`."""

from __future__ import annotations

import json

import pytest

from llm2slm.train import _shortened
from modeling_llm2slm.workflows.speedup import Speedup
from tests.support.checkpoints import PROMPTS, write_checkpoint
from tests.support.commands import kill_when, run


def test_a_recipe_makes_a_model_that_generates(recipe, tmp_path, capsys):
    assert run("train", recipe) == 0
    assert "Trained 2 steps" in capsys.readouterr().out
    assert run("generate", tmp_path / "out", "src1", "--max-new-tokens", 3) == 0
    assert run("info", tmp_path / "out") == 0
    assert "Trained 2 steps" in capsys.readouterr().out


def test_repeated_training_says_that_there_is_nothing_to_do(recipe, capsys, caplog):
    assert run("train", recipe) == 0
    capsys.readouterr()
    assert run("train", recipe, "--max-steps", "1") == 0
    assert "is already trained (2 steps, " in caplog.text
    assert "Trained" not in capsys.readouterr().out


def test_interrupted_training_says_how_to_resume(recipe, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_llm2slm.training.run.train", interrupt)
    assert run("train", recipe) == 130
    assert "Interrupted. Repeat the command to resume." in capsys.readouterr().err


def test_a_wrong_field_is_named_with_the_file_or_the_option_that_holds_it(recipe, capsys):
    assert run("train", recipe, "--learning-rate", "inf") == 1
    assert capsys.readouterr().err == "Error: learning_rate is inf, but it must be a finite number.\n"
    recipe.write_text(recipe.read_text() + "learning_rate: .inf\n")
    assert run("train", recipe) == 1
    assert capsys.readouterr().err == f"Error: {recipe}: learning_rate is inf, but it must be a finite number.\n"
    recipe.write_text(recipe.read_text() + "learning_rate: 1\n")
    assert run("train", recipe) == 1
    assert (
        f"Error: {recipe} is not YAML: the key 'learning_rate' stands in one mapping twice." in capsys.readouterr().err
    )


def test_choices_in_the_help_do_not_break_inside_a_word():
    assert _shortened("adamw|adafactor") == "adamw|adafactor"
    assert _shortened("loss|bleu|chrf|rouge1|exact_match") == "loss|bleu|chrf|..."


def test_every_field_of_a_recipe_is_an_option(recipe, tmp_path):
    words = (
        "--max-steps=1",
        "--output_dir",
        tmp_path / "other",
        "--label_smoothing_factor",
        "0.1",
        "--disable-tqdm",
    )
    assert run("train", recipe, *words) == 0
    record = json.loads((tmp_path / "other" / "training.json").read_text())
    assert record["steps"] == 1
    assert record["recipe"]["disable_tqdm"] is True
    assert not (tmp_path / "out").exists()


def test_fields_that_are_given_as_options_are_checked_like_those_of_the_file(recipe, tmp_path, capsys):
    words = ("train", recipe, "--target-colum", "x")
    assert run(*words) == 1
    assert "no field 'target_colum'. Did you mean target_column?" in capsys.readouterr().err
    assert run("train", recipe, "--train-samples", "0") == 1
    assert "train_samples is '0', but it must be greater than or equal to 1" in capsys.readouterr().err
    assert run("train", recipe, "--max-steps", "1", "--resume", "false", "--skip-bad-rows", "--metric=loss") == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]
    assert (record["resume"], record["skip_bad_rows"], record["metric"]) == (False, True, "loss")


@pytest.mark.parametrize(("command", "left_out"), [("train", set()), ("speedup", {"model", "train_data"})])
def test_help_shows_the_fields_of_a_recipe_with_their_groups(command, left_out, capsys):
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert all(group in shown for group in ("Recipe: data", "Recipe: validation", "Recipe: optimization"))
    for name in ("learning_rate_mapping", "skip_bad_rows", "generation", *left_out):
        assert (f"--{name.replace('_', '-')} " in shown) == (name not in left_out)


@pytest.mark.slow
def test_a_run_killed_three_times_has_the_losses_of_an_uninterrupted_one(recipe, tmp_path):
    words = ("train", recipe, "--max_steps", "60", "--save_strategy", "steps", "--save_steps", "2")
    words += ("--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "3", "--metric", "loss")
    words += ("--save_total_limit", "100", "--train_sampling_strategy", "group_by_length")
    assert run(*words, "--output_dir", tmp_path / "uninterrupted") == 0
    for seen in (2, 9, 16):
        kill_when(lambda seen=seen: len(list((tmp_path / "out").glob("checkpoint-*"))) > seen, "-m", "llm2slm", *words)
        assert not (tmp_path / "out" / "config.json").exists()
    assert run(*words) == 0
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("out", "uninterrupted")]
    assert records[0]["resumed_at_step"] >= 2
    losses = [[(row["step"], row["loss"]) for row in each["log"] if "loss" in row] for each in records]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 20
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "uninterrupted")]
    assert models[0] == models[1]


def test_prompts_become_a_model_that_is_compared_with_the_llm(tmp_path, capsys):
    pytest.importorskip("modeling_llm2slm.configuration", reason="recipes are found in an installed package only")
    llm = write_checkpoint("llm", tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words = ("speedup", "--llm", llm, "--prompts", tmp_path / "prompts.txt", "--slm", tmp_path / "gpt2.json")
    words += ("--output", tmp_path / "fast", "--max-new-tokens", 4, "--num-beams", 1, "--num_train_epochs", 1)
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert all(f"llm2slm {stage}" in printed for stage in ("distill", "build", "encode", "train", "evaluate"))
    assert "times as fast as the LLM" in printed
    assert run("info", tmp_path / "fast" / "model") == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[]", "does not hold a mapping"), ("{}", "prompts is missing"), ('{"prompts": -1}', "prompts is -1")],
)
def test_a_damaged_evaluation_of_a_speedup_is_named(content, problem, tmp_path, capsys, monkeypatch):
    class Finished(Speedup):
        def __init__(self, settings, output, *_):
            self.output = output

        def stages(self):
            return {}

    monkeypatch.setattr("modeling_llm2slm.workflows.speedup.Speedup", Finished)
    (tmp_path / "evaluation.json").write_text(content)
    assert run("speedup", "--llm", "llm", "--prompts", "prompts.txt", "--output", tmp_path) == 1
    error = capsys.readouterr().err
    assert f"evaluation.json cannot be read: {problem}" in error or f"cannot be read: it {problem}" in error
    assert "Remove it, and repeat the command." in error
