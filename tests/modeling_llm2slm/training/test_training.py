"""Recipes, and what a training leaves behind: the best model, a record, and a run that can be taken up again."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from modeling_llm2slm import LLM2SLMForConditionalGeneration, data, training
from modeling_llm2slm import streaming as streams
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.training.training import last_checkpoint, load_recipe, parse_recipe, train
from tests.support.checkpoints import (
    ANSWERS,
    KINDS,
    PAIRS,
    PROMPTS,
    stopped_at,
    write_bart,
    write_checkpoint,
    write_pairs,
)
from tests.support.common import apart, same_tensors


RECIPES = Path(__file__).parents[1] / "configuration" / "recipes"
EXPERIMENTS = set(RECIPES.glob("multi30k*.yaml"))
NEEDED = {"model": "m", "train_data": "d.jsonl", "output_dir": "o"}


class TestRecipe:
    def test_fields_of_both_kinds_lie_flat(self):
        ours, arguments = parse_recipe(
            {
                **NEEDED,
                "metric": "bleu",
                "generation": {"num_beams": 2},
                "num_train_epochs": 2,
                "learning_rate": "1e-3",
            }
        )
        assert (ours.model, ours.metric, ours.generation_kwargs) == ("m", "bleu", {"num_beams": 2})
        assert (arguments.output_dir, arguments.num_train_epochs, arguments.learning_rate) == ("o", 2, 1e-3)

    def test_switches_are_read_as_yaml_and_as_words_of_a_command_line(self):
        for value in (True, "true"):
            assert parse_recipe({**NEEDED, "ignore_data_skip": value})[1].ignore_data_skip is True
        for value in (False, "false"):
            assert parse_recipe({**NEEDED, "resume": value})[0].resume is False

    def test_nothing_is_validated_without_validation_data(self):
        _, arguments = parse_recipe(NEEDED)
        assert arguments.eval_strategy == "no"
        assert not arguments.load_best_model_at_end

    @pytest.mark.parametrize(
        ("settings", "strategy", "steps"),
        [
            ({}, "epoch", None),
            ({"save_steps": 30}, "steps", 30),
            ({"eval_steps": 40}, "steps", 40),
            ({"streaming": True, "max_steps": 9}, "steps", 500),
            ({"streaming": "true", "max_steps": 9, "save_steps": 3}, "steps", 3),
            ({"save_strategy": "steps"}, "steps", 500),
            ({"eval_strategy": "epoch", "save_steps": 30}, "epoch", None),
        ],
    )
    def test_checkpoints_are_written_and_validated_at_once(self, settings, strategy, steps):
        _, arguments = parse_recipe({**NEEDED, "validation_data": "v.jsonl", **settings})
        assert arguments.save_strategy == arguments.eval_strategy == strategy
        if steps is not None:
            assert arguments.save_steps == arguments.eval_steps == steps
        _, arguments = parse_recipe({**NEEDED, **settings, "eval_strategy": "no"})
        assert arguments.eval_strategy == "no"

    def test_numbers_with_exponents_are_numbers(self):
        mapping = parse_recipe({**NEEDED, "lora": "{lora_dropout: 5e-2, r: 4, bias: none}"})[0].mapping("lora")
        assert mapping == {"lora_dropout": 0.05, "r": 4, "bias": "none"}
        rates = parse_recipe({**NEEDED, "learning_rate_mapping": "{projector: 1.5e2}"})[0]
        assert rates.mapping("learning_rate_mapping") == {"projector": 150.0}

    @pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("bleu", True), ("rougeL", True)])
    def test_the_metric_chooses_the_best_checkpoint(self, metric, greater):
        _, arguments = parse_recipe({**NEEDED, "validation_data": "v.jsonl", "metric": metric})
        assert (arguments.metric_for_best_model, arguments.greater_is_better) == (f"eval_{metric}", greater)
        assert arguments.load_best_model_at_end

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"learning_rat": 1}, "no field 'learning_rat'. Did you mean learning_rate"),
            ({"train_date": 1}, "no field 'train_date'. Did you mean train_data"),
            ({"zzzz": 1}, r"no field 'zzzz'\.$"),
            ({"model": None}, "names no model"),
            ({"learning_rate": "fast"}, "learning_rate"),
            ({"optimizer": "sgdd"}, "optimizer"),
            ({"metric": "blue"}, "metric"),
            ({"generation": "beams"}, "generation"),
            ({"generation": {"num_beam": 4}}, "generation has no field 'num_beam'. Did you mean num_beams"),
            ({"learning_rate_mapping": {"projector": "fast"}}, "has 'fast' for 'projector', which is no number"),
            ({"learning_rate_mapping": {"projector": None}}, "has None for 'projector', which is no number"),
            ({"save_only_model": True}, "save_only_model keeps nothing to go on from: say resume: false"),
            ({"resume_from_checkpoint": "o/checkpoint-1"}, "has no resume_from_checkpoint: it goes on from the last"),
            ({"predict_with_generate": "true"}, "has no predict_with_generate: .* a metric, such as bleu"),
            ({"generation_num_beams": 4}, r"generation_num_beams: say generation: \{num_beams: 4\}"),
            ({"push_to_hub": True}, "has no push_to_hub: .*upload output_dir"),
            (
                {"streaming": True, "max_steps": 1, "train_sampling_strategy": "sequential"},
                "random or group_by_length",
            ),
            ({"model": "${LLM2SLM_NOT_SET}/x"}, "environment variable LLM2SLM_NOT_SET, which is not set"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, change, message):
        with pytest.raises(ValueError, match=message) as caught:
            parse_recipe({**NEEDED, **change})
        assert "\n" not in str(caught.value)

    def test_environment_variables_are_filled_in(self, monkeypatch):
        monkeypatch.setenv("LLM2SLM_SOMEWHERE", "/some where")
        ours, arguments = parse_recipe(
            {**NEEDED, "model": "${LLM2SLM_SOMEWHERE}/m", "output_dir": "$LLM2SLM_SOMEWHERE/o"}
        )
        assert (ours.model, arguments.output_dir) == ("/some where/m", "/some where/o")

    @pytest.mark.parametrize(
        ("capability", "settings", "expected"),
        [
            ("AVX2", {"bf16": True}, False),
            ("AVX2", {"bf16": "true", "use_cpu": "true"}, False),
            ("AVX2", {"bf16": "false"}, False),
            ("AVX512", {"bf16": True}, True),
        ],
    )
    def test_a_cpu_that_emulates_bf16_trains_in_float32(self, monkeypatch, caplog, capability, settings, expected):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        _, arguments = parse_recipe({"use_cpu": True, **NEEDED, **settings})
        assert arguments.bf16 is expected
        said = any("bf16 is left out" in record.message for record in caplog.records)
        assert said == (capability == "AVX2" and settings["bf16"] != "false")

    def test_overrides_go_before_the_file(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**NEEDED, "seed": 1}))
        assert load_recipe(path, {"seed": "2"}) == {**NEEDED, "seed": "2"}

    @pytest.mark.parametrize("content", ["a: [", "- a list"])
    def test_a_file_that_is_no_recipe_is_an_error(self, tmp_path, content):
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"recipe\.yaml is not"):
            load_recipe(path)

    # An experiment is no recipe, it holds many: tests/test_multi30k.py.
    @pytest.mark.parametrize("path", sorted({*RECIPES.glob("*.yaml")} - EXPERIMENTS), ids=lambda path: path.stem)
    def test_the_recipes_of_the_project_are_right(self, path, monkeypatch):
        monkeypatch.setenv("LLM2SLM_DATA", "data")
        monkeypatch.setenv("LLM2SLM_RUNS", "runs")
        filled_in = {"model": "m", "train_data": "t.jsonl", "validation_data": "v.jsonl", "output_dir": "runs/o"}
        by_command = path.stem == "speedup"  # `llm2slm speedup` fills these in
        ours, arguments = parse_recipe(load_recipe(path, filled_in if by_command else None))
        assert ours.validation_data
        assert arguments.output_dir.startswith("runs/")


@pytest.mark.parametrize("path", sorted(RECIPES.parent.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_the_launch_configs_of_the_project_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_checkpoint(kind, folder / kind) for kind in KINDS}


@pytest.fixture
def recipe(checkpoints, tmp_path) -> dict[str, Any]:
    """Two validations in six steps of an SLM alone."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    return {
        "model": checkpoints["slm"],
        "train_data": data,
        "validation_data": data,
        "output_dir": str(tmp_path / "out"),
        "metric": "chrf",
        "generation": {"max_new_tokens": 8},
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_to_write_its_answers(recipe, checkpoints, kind):
    before = weights(checkpoints[kind])
    report = train(
        {
            **recipe,
            "model": checkpoints[kind],
            "metric": "exact_match",
            "label_smoothing_factor": 0.1,
            "optimizer": "adafactor" if kind == "llm" else "adamw",
            "learning_rate": 3e-2 if kind == "llm" else 1e-2,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "max_steps": 120,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 60,
            "save_steps": 60,
            "per_device_train_batch_size": 8,
            "train_sampling_strategy": "group_by_length",
        }
    )
    assert report["best_metric"] >= 80
    trained = TextToText.from_pretrained(recipe["output_dir"])
    assert trained.model.config.use_cache
    answers = trained.generate(PROMPTS, max_new_tokens=8)
    assert sum(a == b for a, b in zip(answers, ANSWERS, strict=True)) / len(PAIRS) * 100 == report["best_metric"]
    after = weights(recipe["output_dir"])
    frozen = {name for name in before if name.startswith("encoder.llm.")} if kind == "llm2slm" else set()
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


def test_the_record_tells_what_was_done(recipe):
    report = train(recipe)
    written = json.loads((Path(recipe["output_dir"]) / "training.json").read_text())
    assert written == report
    assert report["recipe"] == recipe
    assert report["steps"] == 6
    assert [row["eval_chrf"] for row in report["log"] if "eval_chrf" in row]
    assert report["best_metric"] == max(row["eval_chrf"] for row in report["log"] if "eval_chrf" in row)
    assert report["versions"]["torch"] == torch.__version__


def test_bf16_that_was_left_out_is_not_recorded_as_used(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    plain = train({**recipe, "output_dir": str(tmp_path / "plain")})
    report = train({**recipe, "bf16": True})
    assert report["recipe"] == {**recipe, "bf16": False}
    assert report["best_metric"] == plain["best_metric"]
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "plain"))


@pytest.mark.parametrize("asked", [{}, {"do_sample": True}])
def test_validation_samples_only_if_asked_to(recipe, monkeypatch, asked):
    seen = []
    monkeypatch.setattr(
        TextToText, "generate", lambda self, prompts, *_, **kwargs: seen.append(kwargs) or ["src1"] * len(prompts)
    )
    train({**recipe, "max_steps": 1, "generation": {"max_new_tokens": 8, **asked}})
    assert seen[0] == {"do_sample": False, "max_new_tokens": 8, **asked}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "splits", [("train", "validation"), ("train[:4]", "test")], ids=["by default", "as the recipe says"]
)
def test_a_data_set_on_the_hub_is_read_by_its_splits(recipe, monkeypatch, streaming, splits):
    read = []

    def load(name: str, configuration: str | None, split: str, streaming: bool = False) -> Dataset:
        read.append((name, split, streaming))
        return Dataset.from_list(PAIRS)

    monkeypatch.setattr(data, "load_dataset", load)
    monkeypatch.setattr(streams, "load_dataset", load)
    named = {} if splits[0] == "train" else dict(zip(("train_split", "validation_split"), splits, strict=True))
    hub = {"train_data": "user/pairs", "validation_data": "user/pairs", "streaming": streaming, "metric": "loss"}
    train({**recipe, **hub, **named, "max_steps": 1})
    assert set(read) == {("user/pairs", splits[0], streaming), ("user/pairs", splits[1], False)}


def test_a_prompt_that_the_llm_has_no_positions_for_is_a_bad_row(recipe, checkpoints, tmp_path):
    model = Path(shutil.copytree(checkpoints["llm2slm"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["encoder"]["max_position_embeddings"] = 5
    (model / "config.json").write_text(json.dumps(config))
    recipe = {**recipe, "model": str(model), "max_steps": 1, "metric": "loss"}
    with pytest.raises(ValueError, match="row 0 has a prompt of 7 tokens, but the LLM has 5 positions"):
        train(recipe)
    with pytest.raises(ValueError, match=r"row \d has a prompt of 7 tokens, but the LLM has 5 positions"):
        encode(model, [recipe["train_data"]], tmp_path / "states")
    assert not (tmp_path / "states").exists()
    assert train({**recipe, "skip_bad_rows": True})["steps"] == 1


@pytest.mark.parametrize("settings", [{}, {"streaming": True}, {"streaming": True, "dataloader_num_workers": 1}])
def test_data_without_a_row_that_can_be_used_is_an_error(recipe, tmp_path, settings):
    long = [{"prompt": " ".join(["src1"] * 70), "target": "src2"}] * 3
    recipe = {**recipe, "train_data": write_pairs(tmp_path / "long.jsonl", long), "skip_bad_rows": True}
    run = partial(apart, train) if "dataloader_num_workers" in settings else train
    with pytest.raises(ValueError, match=r"long\.jsonl: no row can be used.* Take other data\.$"):
        run({**recipe, **settings, "max_steps": 1, "metric": "loss"})
    assert not (Path(recipe["output_dir"]) / "training.json").exists()


def test_the_record_tells_no_token(recipe):
    recipe = {**recipe, "validation_data": None, "metric": "loss", "max_steps": 1}
    assert train({**recipe, "hub_token": "hf_secret"})["recipe"] == recipe
    assert "hf_secret" not in (Path(recipe["output_dir"]) / "training.json").read_text()


def test_the_best_checkpoint_is_kept_not_the_last(recipe, monkeypatch):
    scores = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(training, "score", lambda *_: {"chrf": next(scores)})
    report = train(recipe)
    assert (report["best_metric"], report["best_step"]) == (30.0, 4)
    same_tensors(weights(recipe["output_dir"]), weights(Path(recipe["output_dir"]) / "checkpoint-4"))
    last = weights(Path(recipe["output_dir"]) / "checkpoint-6")
    assert any(not torch.equal(tensor, last[name]) for name, tensor in weights(recipe["output_dir"]).items())


def test_a_stopped_run_continues_to_the_same_weights(recipe, tmp_path):
    train({**recipe, "output_dir": str(tmp_path / "whole")})
    with stopped_at(5):
        train(recipe)
    assert not (Path(recipe["output_dir"]) / "config.json").exists()  # nothing that looks like a result
    out = Path(recipe["output_dir"])
    unfinished = [out / ".0123abcd.checkpoint-6", out.with_name(".0123abcd.out")]  # as killed saves leave them
    others = [out / ".0123.checkpoint-6", out.with_name(".my-notes.out")]
    for folder in (*unfinished, *others):
        folder.mkdir()
    report = train(recipe)
    assert [folder.exists() for folder in (*unfinished, *others)] == [False, False, True, True]
    assert (report["resumed_at_step"], report["steps"]) == (4, 6)
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": 1e-1}, "was begun with learning_rate: 0.003, and cannot go on with 0.1"),
        ({"train_data": "other.jsonl"}, "was begun with train_data: pairs.jsonl"),
        ({"lr_scheduler_type": "constant"}, "was begun with lr_scheduler_type"),
        ({"per_device_train_batch_size": 2}, "was begun with pairs a step: 4, and cannot go on with 2"),
        ({"max_grad_norm": 5}, "was begun with max_grad_norm: 1.0"),
        ({"metric": "bleu"}, "was begun with metric_for_best_model: eval_chrf, and cannot go on with eval_bleu"),
        ({"validation_samples": 3}, "was begun with validation_samples: None, and cannot go on with 3"),
    ],
)
def test_a_run_does_not_go_on_by_another_recipe(recipe, tmp_path, change, told):
    train({**recipe, "num_train_epochs": 1})
    write_pairs(tmp_path / "other.jsonl", PAIRS[::-1])
    if "train_data" in change:
        change = {"train_data": str(tmp_path / "other.jsonl")}
    steps = 24 // (change.get("per_device_train_batch_size") or 4)
    with pytest.raises(ValueError, match=rf"{told}.*another output_dir, or begin anew with resume: false"):
        train({**recipe, **change})
    assert train({**recipe, **change, "resume": False})["steps"] == steps
    assert train({**recipe, **change, "num_train_epochs": 4})["resumed_at_step"] == steps


def test_the_same_pairs_a_step_go_on_and_other_data_of_the_same_name_does_not(recipe):
    train({**recipe, "num_train_epochs": 1})
    accumulated = {**recipe, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train({**accumulated, "num_train_epochs": 2})["steps"] == 4
    write_pairs(Path(recipe["train_data"]), PAIRS[:-1])
    with pytest.raises(
        ValueError, match=r"was begun with bytes of train_data: \d+, and cannot go on with \d+\. Put it"
    ):
        train(recipe)


def test_the_order_of_groups_goes_by_pairs_a_step(recipe):
    """However they are cut into batches, an epoch that goes on reads what is left of it."""
    orders = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4), (2, 1)):
        ours, arguments = parse_recipe(
            {
                **recipe, "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulated,
            }
        )  # fmt: skip
        orders.append(list(training._trainer(ours, arguments, training._load(ours))._get_train_sampler()))
    assert orders[0] == orders[1] == orders[2] != orders[3]


def test_a_stream_has_the_seed_of_its_data(recipe):
    recipe = {**recipe, "streaming": True, "max_steps": 2, "shuffle_buffer": 100}
    orders = []
    for settings in ({"seed": 1}, {"data_seed": 1}, {"seed": 1, "data_seed": 42}):
        ours, arguments = parse_recipe({**recipe, **settings})
        stream = training._stream(ours, arguments, training._load(ours))
        orders.append([row["input_ids"] for row, _ in zip(stream, range(len(PAIRS)), strict=False)])
    assert orders[0] == orders[1] != orders[2]


def test_an_llm_that_trains_does_so_in_float32(checkpoints, recipe, tmp_path):
    """In bfloat16 most steps are too small to move a weight."""
    model = TextToText.from_pretrained(checkpoints["llm2slm"], dtype="bfloat16")
    for freeze, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model.model.config.freeze_llm = freeze
        model.save_pretrained(tmp_path / str(freeze))
        ours, _ = parse_recipe({**recipe, "model": str(tmp_path / str(freeze))})
        assert training._load(ours).model.encoder.llm.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_make_features_are_sent_no_weights(checkpoints, kind):
    text_to_text = TextToText.from_pretrained(checkpoints[kind])
    reader = text_to_text.without_model()
    prompts, answers = ["src1", "src2 " * 70], ["src1", "src1"]
    features = text_to_text.features(prompts, answers)
    assert reader.features(prompts, answers) == features
    assert reader.problems(features) == text_to_text.problems(features)
    assert len(pickle.dumps(text_to_text)) - len(pickle.dumps(reader)) > 4 * text_to_text.model.num_parameters()


def test_training_sends_no_weights_to_processes(checkpoints, recipe, monkeypatch):
    sent, original = [], Dataset.map

    def look(self, function, **kwargs):
        sent.append(len(dill.dumps(function)))
        return original(self, function, **kwargs)

    monkeypatch.setattr(Dataset, "map", look)
    recipe = {**recipe, "model": checkpoints["llm2slm"]}
    ours, arguments = parse_recipe(recipe)
    text_to_text = training._load(ours)
    training._trainer(ours, arguments, text_to_text)
    ours, arguments = parse_recipe({**recipe, "streaming": True, "max_steps": 1})
    sent.append(len(dill.dumps(training._stream(ours, arguments, text_to_text))))
    assert len(sent) == 3
    assert max(sent) < 4 * text_to_text.model.num_parameters()


def test_a_run_that_has_ended_is_no_run_by_another_recipe(recipe):
    train({**recipe, "max_steps": 1})
    with pytest.raises(ValueError, match="was begun with learning_rate: 0.003"):
        train({**recipe, "max_steps": 1, "learning_rate": 1e-1})


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 1.5}])
def test_a_run_that_ended_before_its_model_was_written_takes_no_step_more(recipe, tmp_path, length):
    first = train({**recipe, "save_steps": 1, **length})
    assert first["steps"] == 3
    Path(recipe["output_dir"], "training.json").unlink()
    assert train({**recipe, "save_steps": 1, **length})["steps"] == 3


def test_a_validation_prompt_without_room_for_its_answer_is_a_bad_row(recipe, tmp_path):
    long = {"prompt": "src1 " * 40, "target": "src2"}
    recipe["validation_data"] = write_pairs(tmp_path / "v.jsonl", [PAIRS[0], long])
    recipe["generation"] = {"max_new_tokens": 40}
    with pytest.raises(
        ValueError, match=r"v\.jsonl: row 1 has no room for an answer: Prompt and output have 8\d tokens"
    ):
        train(recipe)
    assert not Path(recipe["output_dir"]).exists()
    assert train({**recipe, "max_steps": 1, "skip_bad_rows": True})["steps"] == 1
    assert train({**recipe, "max_steps": 2, "metric": "loss", "resume": False})["steps"] == 2


def test_a_prompt_that_a_whole_llm_has_no_positions_for_is_a_bad_row(recipe, tmp_path):
    recipe |= {"model": write_bart(tmp_path / "bart"), "validation_data": None, "metric": "loss"}
    recipe["train_data"] = write_pairs(tmp_path / "long.jsonl", [PAIRS[0], {"prompt": "src1 " * 70, "target": "src2"}])
    with pytest.raises(ValueError, match=r"row 1 is too long: The prompt has 7\d tokens .* the LLM has 64 positions"):
        train(recipe)
    assert train({**recipe, "skip_bad_rows": True, "max_steps": 1})["steps"] == 1


def test_a_checkpoint_that_was_being_written_is_left_aside(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, complete in ((90, True), (100, True), (110, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-110" / "trainer_state.json").write_text('{"epoch": 1.')  # killed while it was written
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("length", [{}, {"max_steps": 6}])
def test_without_resume_a_run_starts_anew(recipe, tmp_path, length):
    """Killed, it goes on from where it was, not from where the run before it was."""
    other = {**recipe, **length, "learning_rate": 1e-2}
    train({**other, "output_dir": str(tmp_path / "whole")})
    train({**recipe, **length, "save_total_limit": 9})
    with stopped_at(3):
        train({**other, "resume": False})
    report = train(other)
    assert (report["resumed_at_step"], report["steps"]) == (2, 6)
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "whole"))


def test_a_full_disk_is_told_when_a_checkpoint_does_not_fit(recipe, monkeypatch):
    def save(state: Any, path: str) -> None:
        monkeypatch.undo()
        torch.save(state, "/dev/full")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="its disk may be full. Make room, and repeat the command"):
        train(recipe)
    assert train(recipe)["resumed_at_step"] is None


def test_a_failure_while_saving_leaves_no_model(recipe, monkeypatch):
    def fail(self: TextToText, path: Path) -> None:
        self.model.save_pretrained(path)
        raise OSError("disk full")

    monkeypatch.setattr(TextToText, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train(recipe)
    assert [path.name for path in Path(recipe["output_dir"]).glob("*.json")] == ["recipe.json"]


def test_the_loss_alone_can_choose(recipe):
    report = train({**recipe, "metric": "loss"})
    losses = [row["eval_loss"] for row in report["log"] if "eval_loss" in row]
    assert report["best_metric"] == min(losses)


def test_without_validation_the_last_weights_are_kept(recipe):
    recipe = {key: value for key, value in recipe.items() if key not in ("validation_data", "metric")}
    report = train({**recipe, "train_samples": 4})
    assert (report["steps"], report["best_metric"]) == (3, None)
    same_tensors(weights(recipe["output_dir"]), weights(Path(recipe["output_dir"]) / "checkpoint-3"))


@pytest.mark.parametrize("held", [False, True])
def test_checkpoints_on_the_way_are_lean_unless_asked_and_the_model_is_full(held, recipe, checkpoints):
    out = Path(recipe["output_dir"])
    train({**recipe, "max_steps": 2, "model": checkpoints["llm2slm"], "include_llm_in_checkpoints": held})
    checkpoint = next(out.glob("checkpoint-*"))
    has_llm = [any(name.startswith("encoder.llm.") for name in weights(folder)) for folder in (out, checkpoint)]
    assert has_llm == [True, held]
    # This LLM is in no checkpoint of its own, but in the one that training started from.
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint)
    same_tensors(loaded.encoder.llm.state_dict(), TextToText.from_pretrained(out).model.encoder.llm.state_dict())
    assert "max_steps: 2" in (out / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize("settings", [{}, {"lora": {}, "include_llm": False}])
def test_a_changed_llm_is_said_before_the_training(recipe, checkpoints, tmp_path, settings):
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoints["llm2slm"])
    model.config.llm_source = {"name_or_path": "google-t5/t5-large", "fingerprint": "0" * 32}
    model.save_pretrained(tmp_path / "start")
    TextToText.from_pretrained(checkpoints["llm2slm"]).processor.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="it was changed"):
        train({**recipe, **settings, "model": str(tmp_path / "start")})
    assert not Path(recipe["output_dir"]).exists()
    if "lora" in settings:  # an adapter's checkpoints have no LLM to find again
        assert train({**recipe, "lora": {}, "model": str(tmp_path / "start"), "max_steps": 1})["steps"] == 1


def test_what_a_run_starts_from_is_not_removed(recipe):
    train({**recipe, "max_steps": 2})
    checkpoint = last_checkpoint(recipe["output_dir"])
    with pytest.raises(ValueError, match=r"resume: false removes .*checkpoint-2, which the training starts from"):
        train({**recipe, "model": checkpoint, "resume": False})
    assert last_checkpoint(recipe["output_dir"]) == checkpoint


def test_a_lean_model_does_not_replace_its_llm(recipe, checkpoints, tmp_path):
    shutil.copytree(checkpoints["llm2slm"], tmp_path / "model")
    recipe |= {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "model"), "include_llm": False}
    with pytest.raises(ValueError, match="which a lean checkpoint in .*model would replace"):
        train(recipe)


def test_a_lean_model_is_trained_on_request(recipe, checkpoints):
    out = Path(recipe["output_dir"])
    train({**recipe, "max_steps": 1, "model": checkpoints["llm2slm"], "include_llm": False})
    assert not any(name.startswith("encoder.llm.") for name in weights(out))
    start = TextToText.from_pretrained(checkpoints["llm2slm"]).model.encoder.llm.state_dict()
    trained = TextToText.from_pretrained(out).model.encoder.llm.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in start.items())


def test_a_repeated_run_keeps_the_time_of_the_first(recipe):
    first = train({**recipe, "num_train_epochs": 1})
    again = train({**recipe, "num_train_epochs": 1})
    assert (again["seconds"], again["resumed_at_step"]) == (first["seconds"], None)
    assert train({**recipe, "num_train_epochs": 2})["resumed_at_step"] == first["steps"]


def test_a_finished_run_is_not_trained_further(recipe):
    """From a checkpoint at `max_steps` the Trainer would take one step more, each time."""
    first = train({**recipe, "max_steps": 2})
    weights = Path(recipe["output_dir"], "model.safetensors").read_bytes()
    again = train({**recipe, "max_steps": 2})
    assert again["steps"] == first["steps"] == 2
    assert Path(recipe["output_dir"], "model.safetensors").read_bytes() == weights
    assert train({**recipe, "max_steps": 3})["steps"] == 3
