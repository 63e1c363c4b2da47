"""Recipes: what they take, and what is wrong with them in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from modeling_llm2slm.engines.quantization import QUANTIZATIONS
from modeling_llm2slm.settings import METRICS
from modeling_llm2slm.training.recipe import Recipe, RecipeError, load_recipe, parse_recipe, recipe_fields
from modeling_llm2slm.training.run import train


RECIPES = Path(__file__).parents[3] / "configuration" / "recipes"
EXPERIMENTS = {*RECIPES.glob("multi30k*.yaml"), RECIPES / "pretrained.yaml"}
NEEDED = {"model": "m", "train_data": "d.jsonl", "output_dir": "o"}


class TestRecipe:
    def test_recipe_takes_our_fields_and_those_of_the_trainer(self):
        ours, arguments = parse_recipe(
            {
                **NEEDED,
                "metric": "bleu",
                "generation": {"num_beams": 2},
                "num_train_epochs": 2,
                "learning_rate": "1e-3",
            }
        )
        assert (ours.model, ours.metric, ours.generation) == ("m", "bleu", {"num_beams": 2})
        assert (arguments.output_dir, arguments.num_train_epochs, arguments.learning_rate) == ("o", 2, 1e-3)

    def test_switches_are_read_from_yaml_and_from_text(self):
        for value in (True, "true"):
            assert parse_recipe({**NEEDED, "ignore_data_skip": value})[1].ignore_data_skip is True
        for value in (False, "false"):
            assert parse_recipe({**NEEDED, "resume": value})[0].resume is False

    def test_recipe_without_validation_data_does_not_validate(self):
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
    def test_checkpoints_are_saved_and_validated_at_the_same_time(self, settings, strategy, steps):
        _, arguments = parse_recipe({**NEEDED, "validation_data": "v.jsonl", **settings})
        assert arguments.save_strategy == arguments.eval_strategy == strategy
        if steps is not None:
            assert arguments.save_steps == arguments.eval_steps == steps
        _, arguments = parse_recipe({**NEEDED, **settings, "eval_strategy": "no"})
        assert arguments.eval_strategy == "no"

    def test_validation_data_that_is_never_used_is_refused(self):
        with pytest.raises(ValueError, match="eval_strategy is 'no', but validation_data is set: remove one of them"):
            parse_recipe({**NEEDED, "validation_data": "v.jsonl", "eval_strategy": "no"})

    def test_numbers_with_exponents_are_numbers(self):
        lora = parse_recipe({**NEEDED, "lora": "{lora_dropout: 5e-2, r: 4, bias: none}"})[0].lora
        assert lora == {"lora_dropout": 0.05, "r": 4, "bias": "none"}
        rates = parse_recipe({**NEEDED, "learning_rate_mapping": "{projector: 1.5e2}"})[0]
        assert rates.learning_rate_mapping == {"projector": 150.0}

    def test_file_is_read_by_the_rules_of_yaml_1_2(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("learning_rate: 1e-3\nwarmup_steps: -2.5E+1\nmax_steps: 7\neval_strategy: no\nbf16: true")
        recipe = load_recipe(path)
        assert recipe == {
            "learning_rate": 1e-3, "warmup_steps": -25.0, "max_steps": 7, "eval_strategy": "no", "bf16": True
        }  # fmt: skip
        assert parse_recipe({**NEEDED, **recipe, "warmup_steps": 0})[1].eval_strategy == "no"

    def test_names_are_taken_in_kebab_case_and_as_they_were_called_before(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("answer-column: old\nmax-steps: 3\nanswer_max_length: 9\n")
        recipe = load_recipe(path, {"max-steps": "5"})
        assert recipe == {"target_column": "old", "max_steps": "5", "target_max_length": 9}
        assert load_recipe(path, {"target-column": "new"})["target_column"] == "new"
        ours, arguments = parse_recipe({**NEEDED, **recipe})
        assert (ours.target_column, ours.target_max_length, arguments.max_steps) == (["old"], 9, 5)
        with pytest.raises(ValueError, match="sets target_column twice"):
            parse_recipe({**NEEDED, "target_column": "a", "answer_column": "b"})

    def test_mappings_and_lists_of_the_trainer_are_taken_as_text_too(self):
        _, arguments = parse_recipe(
            {**NEEDED, "lr_scheduler_kwargs": "{num_cycles: 2}", "report_to": "[tensorboard]", "optim": "adafactor"}
        )
        assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}
        assert arguments.report_to == ["tensorboard"]
        assert arguments.optim == "adafactor"

    @pytest.mark.parametrize("names", [["target", "llm_output"], "[target, llm_output]", "target,llm_output"])
    def test_target_columns_are_taken_as_a_list_and_as_text(self, names):
        assert parse_recipe({**NEEDED, "target_column": names})[0].target_column == ["target", "llm_output"]

    @pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("bleu", True), ("rougeL", True)])
    def test_metric_chooses_the_best_checkpoint(self, metric, greater):
        _, arguments = parse_recipe({**NEEDED, "validation_data": "v.jsonl", "metric": metric})
        assert (arguments.metric_for_best_model, arguments.greater_is_better) == (f"eval_{metric}", greater)
        assert arguments.load_best_model_at_end

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"torch_compile_backend": "x"}, "torch_compile_backend is 'x', but it must be one of: no, eager"),
            ({"learning_rat": 1}, "no field 'learning_rat'. Did you mean learning_rate"),
            ({"train_date": 1}, "no field 'train_date'. Did you mean train_data"),
            ({"zzzz": 1}, r"no field 'zzzz'\.$"),
            ({"model": None}, "has no model: set it"),
            ({"learning_rate": "fast"}, "learning_rate is 'fast', but it must be a valid number"),
            ({"optimizer": "sgdd"}, "optimizer is 'sgdd', but it must be 'adamw' or 'adafactor'"),
            ({"metric": "blue"}, "metric is 'blue', but it must be 'loss', 'bleu', .* or 'exact_match'"),
            ({"generation": "beams"}, r"generation is 'beams', but it must map .* such as \{num_beams: 4\}"),
            ({"lora": "{r: 8"}, r"lora is '\{r: 8', but it must map names to values"),
            ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin', but it must be 'linear', 'cosine'"),
            ({"bf16": "maybe"}, "bf16 is 'maybe', but it must be a valid boolean"),
            ({"learning_rate": float("inf")}, "learning_rate is inf, but it must be a finite number"),
            ({"max_steps": -5}, "max_steps is -5, but it must be at least 1, or -1"),
            ({"num_train_epochs": True}, "num_train_epochs is true, but it must be a number"),
            ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, but it must be at least 1"),
            ({"seed": 2**32}, "seed is 4294967296, but it must be at most 4294967295"),
            ({"log_level": "loud"}, "log_level is 'loud', but it must be one of: detail, debug"),
            ({"report_to": "wandbb"}, "report_to has no field 'wandbb'. Did you mean wandb"),
            ({"accelerator_config": "no.json"}, "accelerator_config is 'no.json', which the Trainer refuses: "),
            (
                {"metric_for_best_model": "x", "load_best_model_at_end": True, "validation_data": "v"},
                "one of: eval_loss",
            ),
            ({"lora": {"r": "x"}}, "lora.r is 'x', but it must be a valid integer"),
            ({"lora": {"r": 0}}, "lora.r is 0, but it must be at least 1"),
            ({"lora": {"rank": 8}}, "lora has no field 'rank'. Did you mean rank_pattern"),
            ({"lora": {"lora_dropout": 2}}, "lora.lora_dropout is 2.0, but it must be below 1"),
            ({"lora": {"inference_mode": True}}, "lora has no field 'inference_mode'"),
            ({"generation": {"num_beams": 10**6}}, "generation.num_beams is 1000000, but it must be at most 1024"),
            ({"generation": {"top_p": 7, "do_sample": True}}, "generation.top_p is 7, but it must be at most 1"),
            ({"generation": {"top_p": 0.5}}, "generation.top_p needs sampling: add do_sample: true"),
            ({"generation": {"max_new_tokens": "many"}}, "max_new_tokens is 'many', but it must be a whole number"),
            ({"generation": {"num_return_sequences": 2}}, "num_return_sequences is 2, but it must be at most 1"),
            (
                {"learning_rate_mapping": {"(": 1}},
                r"learning_rate_mapping has '\(', which is not a regular expression",
            ),
            ({"train_data": "a\0b"}, "train_data is 'a.x00b', but it must be text without NUL"),
            ({"validation_data": ""}, "validation_data is '', but it must be text that is not empty"),
            ({"target_column": []}, "target_column is \\[\\], but it must be a list that is not empty"),
            ({"max_steps": 3.5}, r"max_steps is 3\.5, but it must be a valid integer"),
            ({"train_samples": 0}, "train_samples is 0, but it must be greater than or equal to 1"),
            ({"quantize_llm": "int3"}, "quantize_llm is 'int3', but it must be 'int8' or 'nf4'"),
            ({"llm_states": "s", "quantize_llm": "int8"}, "quantize_llm has no effect: leave out one of the two"),
            ({"target_column": "[target, llm_output"}, "but it must be a name or a list"),
            ({"generation": {"num_beam": 4}}, "generation has no field 'num_beam'. Did you mean num_beams"),
            (
                {"learning_rate_mapping": {"projector": "fast"}},
                "has 'fast' for 'projector', but it must be a valid number",
            ),
            (
                {"learning_rate_mapping": {"projector": None}},
                "has None for 'projector', but it must be a valid number",
            ),
            ({"learning_rate_mapping": {"projector": float("nan")}}, "has nan for 'projector', .* a finite number"),
            ({"learning_rate_mapping": 3}, "learning_rate_mapping is 3, but it must map names to values"),
            ({"save_only_model": True}, "save_only_model saves nothing .* resume from: set resume: false"),
            (
                {"resume_from_checkpoint": "o/checkpoint-1"},
                "has no resume_from_checkpoint: training resumes from the last",
            ),
            ({"predict_with_generate": "true"}, "has no predict_with_generate: .* a metric, such as bleu"),
            ({"generation_num_beams": 4}, r"generation_num_beams: set generation: \{num_beams: 4\}"),
            ({"push_to_hub": True}, "has no push_to_hub: .*upload output_dir"),
            (
                {"streaming": True, "max_steps": 1, "train_sampling_strategy": "sequential"},
                "random or group_by_length",
            ),
            (
                {"model": "${LLM2SLM_NOT_SET}/x"},
                "model uses the environment variable 'LLM2SLM_NOT_SET', which is not set",
            ),
        ],
    )
    def test_wrong_recipe_is_refused_in_one_line(self, change, message):
        with pytest.raises(ValueError, match=message) as caught:
            parse_recipe({**NEEDED, **change})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs is {'x': 1}, which the schedule 'linear' "),
            ({"optim_args": "x"}, "optim is 'adamw_torch.*', which cannot be used: "),
            ({"report_to": "wandb"}, "report_to has 'wandb', which is not installed. Try: pip install wandb"),
            ({"report_to": ["comet_ml"]}, "pip install comet-ml, or set report_to: none"),
        ],
    )
    def test_what_the_trainer_cannot_make_is_refused_before_anything_is_loaded(self, change, message, monkeypatch):
        monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
        with pytest.raises(RecipeError, match=message):
            train({**NEEDED, **change})

    def test_environment_variables_are_expanded(self, monkeypatch):
        monkeypatch.setenv("LLM2SLM_SOMEWHERE", "/some where")
        ours, arguments = parse_recipe(
            {**NEEDED, "model": "${LLM2SLM_SOMEWHERE}/m", "output_dir": "$LLM2SLM_SOMEWHERE/o"}
        )
        assert (ours.model, arguments.output_dir) == ("/some where/m", "/some where/o")

    def test_paths_are_taken_as_texts(self):
        ours, arguments = parse_recipe({**NEEDED, "model": Path("a/m"), "output_dir": Path("a/o")})
        assert (ours.model, arguments.output_dir) == ("a/m", "a/o")

    @pytest.mark.parametrize(
        ("capability", "settings", "expected"),
        [
            ("AVX2", {"bf16": True}, False),
            ("AVX2", {"bf16": "true", "use_cpu": "true"}, False),
            ("AVX2", {"bf16": "false"}, False),
            ("AVX512", {"bf16": True}, True),
        ],
    )
    def test_bf16_is_left_out_on_a_cpu_that_emulates_it(self, monkeypatch, caplog, capability, settings, expected):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        _, arguments = parse_recipe({"use_cpu": True, **NEEDED, **settings})
        assert arguments.bf16 is expected
        warned = any("bf16 is left out" in record.message for record in caplog.records)
        assert warned == (capability == "AVX2" and settings["bf16"] != "false")

    def test_overrides_take_precedence_over_the_file(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**NEEDED, "seed": 1}))
        assert load_recipe(path, {"seed": "2"}) == {**NEEDED, "seed": "2"}

    @pytest.mark.parametrize("content", ["a: [", "- a list"])
    def test_file_without_a_mapping_is_an_error(self, tmp_path, content):
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"recipe\.yaml is not"):
            load_recipe(path)

    # An experiment holds many recipes: tests/benchmarks reads those.
    @pytest.mark.parametrize("path", sorted({*RECIPES.glob("*.yaml")} - EXPERIMENTS), ids=lambda path: path.stem)
    def test_shipped_recipes_are_valid(self, path, monkeypatch):
        monkeypatch.setenv("LLM2SLM_DATA", "data")
        monkeypatch.setenv("LLM2SLM_RUNS", "runs")
        filled_in = {"model": "m", "train_data": "t.jsonl", "validation_data": "v.jsonl", "output_dir": "runs/o"}
        by_command = path.stem == "speedup"  # `llm2slm speedup` fills these in
        ours, arguments = parse_recipe(load_recipe(path, filled_in if by_command else None))
        assert ours.validation_data
        assert arguments.output_dir.startswith("runs/")


class TestSchema:
    def test_choices_are_those_that_the_package_implements(self):
        annotations = Recipe.__annotations__
        assert set(get_args(annotations["metric"])) == {"loss", *METRICS}
        assert set(get_args(get_args(annotations["quantize_llm"])[0])) == set(QUANTIZATIONS)

    def test_every_field_has_a_type_a_description_and_a_group(self):
        ours = {field.name: field for field in recipe_fields()}
        assert ours.keys() == Recipe.model_fields.keys()
        assert all(field.type and field.description and field.group for field in ours.values())
        assert [name for name, field in ours.items() if field.required] == ["model", "train_data"]
        assert ours["optimizer"].type == "adamw | adafactor"
        assert (ours["lora"].type, ours["shuffle_buffer"].default) == ("mapping", 10_000)
        theirs = {field.name: field for field in recipe_fields(trainer=True)}
        assert theirs["save_total_limit"].default == 2
        assert theirs["lr_scheduler_type"].type.startswith("linear | cosine | ")
        assert "push_to_hub" not in theirs

    def test_schema_loads_without_the_package(self):
        code = """
import sys
from llm2slm.options import load_module
recipe = load_module("modeling_llm2slm.training.recipe")
print(len(recipe.recipe_fields()), sorted({"torch", "transformers", "modeling_llm2slm"} & set(sys.modules)))
"""
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert result.stdout.split() == [str(len(Recipe.model_fields)), "[]"]


@pytest.mark.parametrize("path", sorted(RECIPES.parent.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_launch_configs_of_the_project_load_in_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP")
