"""The experiment behind a pretrained LLM: its jobs, its scores, and all of it at a tiny size."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoConfig

from benchmarks import pretrained, pretrained_report
from benchmarks.first_token import FirstToken
from benchmarks.pretrained import Experiment
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.training.recipe import parse_recipe
from tests.support.checkpoints import PAIRS, write_checkpoint
from tests.support.exports import needs


def test_each_row_has_a_recipe_and_comes_after_those_it_needs(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, tmp_path, tmp_path)
    names = [name for name, _, _ in experiment.jobs()]
    assert len(names) == len(set(names))
    for task, rows in experiment.settings["rows"].items():
        for name, row in rows.items():
            if "first" not in row:
                assert parse_recipe(experiment.recipe(task, name))[1].bf16
            for other in map(row.get, ("cut", "behind", "outputs_of", "first", "then")):
                assert other is None or names.index(f"{task}/{other}") < names.index(f"{task}/{name}")
    for model in experiment.settings["models"].values():
        AutoConfig.for_model(**model)


@pytest.mark.parametrize(
    ("task", "output", "matches"),
    [
        ("rhymes", " thick \n", True), ("rhymes", "kick", True), ("rhymes", "house", False),
        ("taxonomy_animal", "cat, dog", True), ("taxonomy_animal", "dog", False), ("rhymes", "Thick", False),
    ],
)  # fmt: skip
def test_an_output_matches_any_reference_and_some_are_lists(task: str, output: str, matches: bool) -> None:
    references = ["dog, cat"] if task == "taxonomy_animal" else ["thick", "kick"]
    example = {"task": task, "references": references}
    assert pretrained_report._is_match(output, example) == matches


def test_scores_are_compared_with_the_llm_on_the_same_examples() -> None:
    llm, own = np.array([[100.0], [0.0], [100.0], [100.0]]), np.array([[100.0], [0.0], [0.0], [100.0]])
    compared = pretrained_report._compared(own, llm)
    assert (compared["score"], compared["share"]) == (50.0, pytest.approx(2 / 3))
    low, high = compared["share_interval"]
    assert 0 <= low < 2 / 3 < high <= 1


def test_gains_are_over_rows_of_as_many_prompts(tmp_path: Path) -> None:
    examples = [{"prompt": f"p{n}", "target": f"p{n}", "references": [f"p{n}"], "task": "any"} for n in range(100)]
    rows = {
        "llm": {"start": "llm", "prompts": 10}, "alone": {"cut": "llm", "outputs_of": "llm", "prompts": 10},
        "more": {"cut": "llm", "outputs_of": "llm", "prompts": 20}, "first": {"first": "llm", "then": "alone"},
        "cache": {"cut": "llm", "outputs_of": "llm", "prompts": 10, "behind": "llm"},
    }  # fmt: skip
    experiment = SimpleNamespace(
        settings={"tasks": {"any": {"metric": "exact_match"}}}, examples=lambda task, split: examples,
        row=lambda task, name: rows[name], folder=lambda task, name: tmp_path / name,
    )  # fmt: skip
    right = {"llm": 100, "alone": 40, "more": 60, "first": 50, "cache": 80}
    for name, number in right.items():
        (tmp_path / name).mkdir()
        outputs = [f"p{n}" if n < number else "wrong" for n in range(100)]
        (tmp_path / name / "outputs.json").write_text(json.dumps({"test": outputs}))
    found = pretrained_report.gains(experiment, "any", list(rows))
    scores = {name: {other: one["score"] for other, one in gained.items()} for name, gained in found.items()}
    assert scores == {"first": {"alone": 10}, "cache": {"alone": 40, "first": 30}}
    low, high = found["cache"]["alone"]["interval"]
    assert 25 < low < 40 < high < 55


class Fixed:
    """A model that generates the prompts themselves."""

    def __init__(self) -> None:
        self.tokenizer = self

    def generate_tokens(self, prompts: list[str], **options: Any) -> list[list[int]]:
        return [[1, 2, 3] for _ in prompts]

    def batch_decode(self, tokens: list[list[int]], **options: Any) -> list[str]:
        return ["" for _ in tokens]

    def generate(self, prompts: list[str], batch_size: int, **options: Any) -> list[str]:
        return list(prompts)


def test_each_row_is_timed_in_each_engine_and_quantized_outputs_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [{"prompt": f"p{n}", "target": f"p{n}", "references": [f"p{n}"], "task": "any"} for n in range(1200)]
    rows = {"llm": {"start": "llm"}, "cache": {"behind": "llm"}}
    settings = {"tasks": {"any": {"max_new_tokens": 3, "metric": "exact_match"}}}
    experiment = SimpleNamespace(
        settings=settings, examples=lambda task, split: examples, row=lambda task, name: rows[name],
        folder=lambda task, name: tmp_path / name, model=lambda task, name: tmp_path / name / "model",
    )  # fmt: skip
    exported = []

    def export(source: Path, folder: Path, engine: str, weights: str) -> None:
        folder.mkdir(parents=True)
        exported.append((source.parent.name, engine, weights))

    monkeypatch.setattr(pretrained_report, "export", export)
    monkeypatch.setattr(pretrained_report.TextToText, "from_pretrained", lambda path, **options: Fixed())
    times = pretrained_report._time(experiment, "any", list(rows))
    assert sorted(exported) == [(n, "openvino", w) for n in ("cache", "llm") for w in ("fp32", "int8")]
    for name in rows:
        assert set(times[name]) == {"pytorch", *pretrained_report.ENGINES}
        (tmp_path / name / "outputs.json").write_text(json.dumps({"test": ["wrong", "p1"] * 600}))
    assert all(one["ms_per_output_by_llm"] == 1 for one in times["llm"].values())
    scores = {name: pretrained_report._engine_scores(experiment, "any", name, "openvino-int8") for name in rows}
    # Every second example of 1,200: the outputs of PyTorch there are all wrong.
    assert scores["cache"] == {"examples": 600, "score": 100.0, "score_in_pytorch": 0.0, "equal": 0.0}
    result = {name: {**found.pop("pytorch"), "engines": found} for name, found in times.items()}
    result["cache"]["engines"]["openvino-int8"]["test_part"] = scores["cache"]
    table = pretrained_report._engine_table({"rows": result})
    assert len(table) == 2 + 2 * 3
    assert "100.0, 0.0 | 0.0 %" in table[-1]


def test_the_first_token_of_one_model_and_the_rest_of_another(tmp_path: Path) -> None:
    llm = Path(write_checkpoint("slm", tmp_path))
    prompts, options = ["A man is sleeping.", "A dog"], {"max_new_tokens": 5, "do_sample": False}
    whole = TextToText.from_pretrained(llm).generate_tokens(prompts, **options)
    both = FirstToken(llm, llm)
    assert both.generate_tokens(prompts, 1, **options) == whole
    both.llm.generate_tokens = lambda prompts, *_, **__: [[7], [both.tokenizer.eos_token_id]]
    found = both.generate_tokens(prompts, **options)
    assert found[0][0] == 7
    assert len(found[0]) > 1
    assert found[1] == [both.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "llm-4000", "six-cash-4000"], "No row is named 'six-cash-4000'. Did you mean six-cache-4000?"),
        (["--only", "nothing"], "No job is named 'nothing'."),
    ],
)
def test_a_name_that_does_not_exist_ends_the_command(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrained", "--llm", str(tmp_path), "--runs", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=re.escape(message)):
        pretrained.main()


@pytest.mark.parametrize("option", ["--llm", "--data"])
def test_a_folder_that_is_missing_ends_the_command(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = dict.fromkeys(("--llm", "--data", "--runs"), tmp_path) | {option: tmp_path / "missing"}
    monkeypatch.setattr("sys.argv", ["pretrained", *(str(one) for pair in folders.items() for one in pair)])
    with pytest.raises(SystemExit):
        pretrained.main()
    assert f"missing is no folder. Pass another one with {option}." in capsys.readouterr().err


TINY = {
    "all": {"per_device_train_batch_size": 4, "use_cpu": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "any": {"learning_rate": 1e-3, "num_train_epochs": 1},
}


@pytest.mark.slow
def test_a_tiny_experiment_ends_with_a_report_and_a_repeated_one_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "pairs"
    data.mkdir(parents=True)
    rows = "".join(json.dumps({"source": row["prompt"], "target": row["target"]}) + "\n" for row in PAIRS)
    (data / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    task = {
        "folder": "pairs", "files": dict.fromkeys(pretrained.SPLITS, "rows.jsonl.gz"),
        "prompt": "{source}", "target": "{target}", "metric": "exact_match",
        "max_new_tokens": 4, "validation_samples": 4,
    }  # fmt: skip
    behind = {"cut": "llm", "layers": [0], "behind": "llm", "fusion": "cache", "outputs_of": "llm"}
    file = tmp_path / "experiment.yaml"
    experiment = {
        "tasks": {"pairs": task}, "models": {}, "recipes": TINY,
        "rows": {"pairs": {
            "llm": {"start": "llm", "recipe": "any", "prompts": 8},
            "cache": {**behind, "recipe": "any", "prompts": 8},
            "add": {**behind, "fusion": "add", "build": {"encoder_layer": [0, 1]}, "recipe": "any", "prompts": 8},
            "first": {"first": "llm", "then": "llm"},
        }},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    monkeypatch.setattr(pretrained, "prune_vocabulary", lambda llm, output, corpora: output.symlink_to(llm))
    monkeypatch.setattr(
        pretrained, "report", lambda experiment, **options: pretrained_report.report(experiment, tmp_path, **options)
    )
    needs("openvino")
    llm = write_checkpoint("slm", tmp_path)
    arguments = ["pretrained", "--llm", llm, "--data", str(tmp_path / "data"), "--experiment", str(file)]
    monkeypatch.setattr("sys.argv", [*arguments, "--runs", str(tmp_path / "runs"), "--threads", "1"])
    pretrained.main()
    assert capsys.readouterr().out.count("done after") == 9
    result = json.loads((tmp_path / "pretrained-pairs.json").read_text())
    assert set(result["rows"]) == {"llm", "cache", "add", "first"}
    assert result["rows"]["cache"]["parameters"]["decode"] < result["rows"]["llm"]["parameters"]["decode"]
    assert result["rows"]["cache"]["ms_per_output_by_llm"] > 0
    assert set(result["drafts"]) == {"llm", "prompt lookup", "cache"}
    assert all(draft["equal"] == 1 and draft["by_llm"] > 0 for draft in result["drafts"].values())
    assert result["rows"]["first"]["test"] == result["rows"]["llm"]["test"]
    built = AutoConfig.from_pretrained(tmp_path / "runs" / "pairs" / "add" / "model")
    assert built.encoder_layer == [0, 1]
    for row in result["rows"].values():
        assert set(row["engines"]) == set(pretrained_report.ENGINES)
        assert all(times["ms_per_output_by_best_llm"] > 0 for times in row["engines"].values())
        assert row["engines"]["openvino-int8"]["test_part"]["examples"] == len(PAIRS)
    pretrained.main()
    assert "done after" not in capsys.readouterr().out
