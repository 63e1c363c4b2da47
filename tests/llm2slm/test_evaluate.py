"""Commands that measure: `evaluate`, `plan` and `benchmark`."""

from __future__ import annotations

import json

import pytest

from llm2slm.evaluate import _lengths
from modeling_llm2slm.workflows import limited
from tests.support.checkpoints import PAIRS, PROMPTS, write_checkpoint, write_pairs
from tests.support.commands import run
from tests.support.quick_start import start_quickly


def test_evaluate_prints_and_writes_the_same_numbers(composite, tmp_path, capsys):
    data, output = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "metrics.json"
    assert run("evaluate", composite, data, "--output", output, "--max-new-tokens", 4, "--timed-outputs", 2) == 0
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert result["examples"] == len(PAIRS)
    assert result["data"] == "pairs.jsonl"
    assert f"{result['scores']['chrf']:.2f}" in printed
    assert result["signatures"]["bleu"] in printed


def test_plan_prints_and_writes_the_same_numbers(tmp_path, capsys, monkeypatch):
    start_quickly(monkeypatch, limited)
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    llm, data = write_checkpoint("llm", tmp_path), write_pairs(tmp_path / "pairs.jsonl")
    words = ("plan", "--llm", llm, "--data", data, "--preset", "tiny", "--max-new-tokens", 4, "--batch-size", 1)
    assert run(*words, "--timed-prompts", 1, "--output", tmp_path / "plan.json") == 0
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"{plan['candidates'][0]['speed_up']:.2f}" in printed
    assert plan["recommendation"] in printed
    assert all(word in printed for word in ("memory to train", "time to encode", "1.6 kB", "--slm-tokenizer"))


def test_evaluate_against_the_llm_prints_agreement_and_speed(composite, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:4]) + "\n")
    words = ("evaluate", composite, tmp_path / "prompts.txt", "--against", write_checkpoint("llm", tmp_path))
    assert run(*words, "--max-new-tokens", 3, "--worst", 2, "--output", tmp_path / "a.json") == 0
    result, printed = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert f"{result['agreement']['chrf']:.2f}" in printed
    assert f"{result['speed_up']:.2f} times as fast" in printed
    assert len(result["worst"]) == 2


@pytest.mark.parametrize(("own", "shown"), [(1.0, True), (9.0, False)])
def test_outputs_of_different_lengths_are_named_next_to_the_speed_up(own, shown):
    result = {"speed": {"tokens_per_output": own}, "llm_speed": {"tokens_per_output": 11.0}}
    sentence = "The outputs have 1.0 tokens, the LLM's 11.0: the speed-up compares outputs of different lengths."
    assert (_lengths(result).strip() == sentence) == shown


def test_evaluate_without_references_needs_an_llm(composite, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("src1\n")
    assert run("evaluate", composite, tmp_path / "prompts.txt") == 1
    assert "prompts.txt has prompts but no targets" in capsys.readouterr().err


def test_equal_outputs_are_not_among_the_worst(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("src1\n")
    llm = write_checkpoint("llm", tmp_path)
    words = ("evaluate", llm, tmp_path / "prompts.txt", "--against", llm, "--max-new-tokens", 2)
    assert run(*words, "--timed-outputs", 0) == 0
    assert "chrF 100" not in capsys.readouterr().out


def test_benchmark_prints_a_table_of_each_cell(tmp_path, capsys, monkeypatch):
    start_quickly(monkeypatch, pytest.importorskip("modeling_llm2slm.benchmark.benchmark"))
    (tmp_path / "sweep.yaml").write_text(
        "cells: [{preset: tiny, prompt: 8, output: 3, repeats: 1, contestants: [slm, llm2slm]}]", encoding="utf-8"
    )
    arguments = ("benchmark", tmp_path / "sweep.yaml", "--work", tmp_path, "--output", tmp_path / "benchmark.json")
    assert run(*arguments) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    (cell,) = result["cells"].values()
    printed = capsys.readouterr().out
    assert "tiny 8/3 batch 1 beams 1" in printed
    for name in ("slm", "llm2slm"):
        row = next(line for line in printed.splitlines()[::-1] if f" {name} " in line)
        assert f"{cell['results'][name]['ms_per_token']:.1f}" in row
    assert run(*arguments, "--llm", "runs/llm") == 2
    assert "--llm2slm" in capsys.readouterr().err


def test_the_package_of_plots_is_checked_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modeling_llm2slm.benchmark.plots.is_installed", lambda package: False)
    assert run("benchmark", "--plots", tmp_path / "plots", "--work", tmp_path / "work") == 1
    assert "matplotlib is not installed. Try: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_packages_of_metrics_are_checked_before_anything_is_generated(composite, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modeling_llm2slm.evaluation.metrics.is_installed", lambda package: package != "rouge-score")
    data = write_pairs(tmp_path / "pairs.jsonl")
    for words in ((), ("--against", composite)):
        assert run("evaluate", composite, data, *words) == 1
        assert "rouge-score is not installed. Try: pip install 'modeling-llm2slm[train]'" in capsys.readouterr().err


def test_plan_says_what_it_used(tmp_path, capsys):
    llm = write_checkpoint("llm", tmp_path)
    (tmp_path / "prompts.txt").write_text("src1\n")
    words = ("--max-new-tokens", 2, "--timed-prompts", 1, "--batch-size", 1, "--memory", 2)
    assert run("plan", "--llm", llm, "--data", tmp_path / "prompts.txt", "--preset", "tiny", *words) == 0
    printed = capsys.readouterr().out
    assert "its limit was 2.0 GB (--memory)" in printed
