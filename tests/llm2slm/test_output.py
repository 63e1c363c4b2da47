"""Errors: one sentence, a non-zero exit status, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import llm2slm
from tests.support.checkpoints import write_pairs
from tests.support.commands import run, run_in_new_process


MODEL, DATA, RECIPE, OUT = "<model>", "<data>", "<recipe>", "<out>"
SLM = "examples/demo/gpt2.json"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["generate", "no/such/model", "hello"], 1, "no/such/model cannot be loaded: there is no such folder"),
        (["generate", OUT, "hello"], 1, "cannot be loaded: there is no such folder"),
        (["generate", MODEL, "--file", "no.txt"], 1, "There is no file no.txt"),
        (["generate", MODEL, "hello", "--top-p", "0.5"], 2, "--sample"),
        (
            ["generate", MODEL, "hello", "--sample", "--temperature", "0"],
            2,
            "Input should be greater than or equal to",
        ),
        (["generate", MODEL, "hello", "--num-beams", "0"], 2, "num-beams"),
        (["generate", MODEL, "hello", "--max-new-tokens", "500", "--output", OUT], 1, "64 positions"),
        (["generate"], 2, "model"),
        (["evaluate", MODEL, "no.jsonl", "--output", OUT], 1, "no data file no.jsonl"),
        (["evaluate", MODEL, DATA, "--target-column", "x", "--output", OUT], 1, "no column 'x'"),
        (["evaluate", MODEL, DATA, "--device", "moon", "--output", OUT], 1, "moon"),
        (["train", "no.yaml"], 1, "There is no recipe no.yaml"),
        (["train", RECIPE, "--max_step", "3"], 1, "Did you mean max_steps"),
        (["train", RECIPE, "--learning_rate", "fast", "--output_dir", OUT], 1, "learning_rate"),
        (["train", RECIPE, "--train_data", "no.csv", "--output_dir", OUT], 1, "no data file no.csv"),
        (["train", RECIPE, "--prompt_column", "x", "--output_dir", OUT], 1, "no column 'x'"),
        (["train", RECIPE, "--model", "no/such/model", "--output_dir", OUT], 1, "no/such/model cannot be loaded"),
        (["train", RECIPE, "stray"], 2, "stray"),
        (["build", OUT], 1, "Nothing to build from"),
        (["build", OUT, "--llm", "no/such/model"], 1, "no/such/model cannot be loaded"),
        (["build", OUT, "--llm", "no.json", "--slm", "no.json"], 1, "There is no config file no.json"),
        (["build", OUT, "--preset", "no.json"], 1, "There is no config file no.json"),
        (
            ["generate", "nope", "hello"],
            1,
            "nope cannot be loaded: there is no such folder, and the Hub cannot be reached. Check the path, or ",
        ),
        (["build", OUT, "--slm", SLM], 1, "is a config without a tokenizer: add --slm-tokenizer."),
        (
            ["build", OUT, "--preset", SLM],
            1,
            "gpt2.json is a gpt2 config, but --preset needs an llm2slm config, such as configuration/tiny.json.",
        ),
        (["convert", "lean", MODEL, OUT, "--llm", SLM], 1, f"--llm {SLM} is not a checkpoint folder."),
        (["generate", "examples", "hello"], 1, "examples is not a checkpoint: it has no config.json."),
        (["evaluate", MODEL, DATA, "--device", "cuda:99", "--output", OUT], 1, "Use --device cpu, or install PyTorch"),
        (["info", DATA], 1, "cannot be loaded"),
        (["card", MODEL, "--evaluation", "no.json"], 1, "There is no file no.json"),
        (["convert", "lean", MODEL, OUT], 1, "not known where the LLM comes from"),
        (["convert", "full", MODEL, OUT], 1, "is full already"),
        (["convert", "split", "no/such/model", OUT], 1, "no/such/model cannot be loaded"),
        (["build", OUT, "--llm", MODEL, "--slm", MODEL], 1, "cannot be the LLM"),
        (["convert", "import", MODEL, OUT], 1, "not an encoder-decoder"),
        (["convert", "import", MODEL, OUT, "--mapping", "names.json"], 2, "--into"),
        (["convert", "merge", "no/such/adapter", OUT], 1, "no/such/adapter cannot be loaded"),
        (["inform"], 2, "inform"),
        (["encode", MODEL, "no.jsonl", "--output", OUT], 1, "no data file no.jsonl"),
        (["encode", "no/such/model", DATA, "--output", OUT], 1, "no/such/model cannot be loaded"),
        (["encode", MODEL, DATA, "--output", OUT, "--dtype", "int3"], 2, "float32"),
        (["encode", MODEL, DATA, "--output", OUT, "--prompt-column", "x"], 1, "no column 'x'"),
        (["encode", MODEL, DATA, "--output", OUT, "--device", "cuda:99"], 1, "Use --device cpu, or install PyTorch"),
        (["encode", MODEL, DATA], 2, "output"),
        (["distill", "no/such/model", DATA, "--output", f"{OUT}.jsonl"], 1, "no/such/model cannot be loaded"),
        (["convert", "lean", "no/such/model", OUT], 1, "no/such/model cannot be loaded: there is no such folder"),
        (["distill", MODEL, DATA, "--output", DATA], 1, "exists. Choose another file, or add --overwrite"),
        (["distill", MODEL, DATA, "--output", f"{OUT}.csv"], 1, "must end in .jsonl or .jsonl.gz"),
        (
            ["train", RECIPE, "--llm_states", "no/store", "--output_dir", OUT],
            1,
            "no/store is not a store of hidden states",
        ),
        (["train", RECIPE, "--lora", "{r: 8", "--output_dir", OUT], 1, "lora is"),
        (["train", RECIPE, "--lora", "{rank: 8}", "--output_dir", OUT], 1, "lora"),
        (["train", RECIPE, "--quantize_llm", "int3", "--output_dir", OUT], 1, "quantize_llm"),
        (["plan", "--llm", "no/such/model", "--data", DATA, "--output", OUT], 1, "no/such/model cannot be loaded"),
        (["plan", "--llm", MODEL, "--data", DATA, "--slm-tokenizer", "x"], 2, "PRESET=FOLDER"),
        (["speedup", "--llm", "no/llm", "--prompts", DATA, "--output", OUT], 1, "no/llm cannot be loaded"),
        (["speedup", "--llm", MODEL, "--prompts", DATA, "--output", OUT, "--max_step", "3"], 1, "Did you mean max_st"),
        (["evaluate", MODEL, DATA, "--against", "no/llm", "--output", OUT], 1, "no/llm cannot be loaded"),
    ],
)
def test_an_error_is_one_sentence_and_leaves_nothing_behind(
    words, status, message, composite, recipe, tmp_path, capsys
):
    places = {
        MODEL: composite,
        DATA: str(tmp_path / "pairs.jsonl"),
        RECIPE: str(recipe),
        OUT: str(tmp_path / "output"),
    }
    before = sorted(tmp_path.iterdir())
    words = [places.get(word, word).replace(OUT, places[OUT]) for word in words]
    assert run(*words) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    if status == 1:
        assert error.startswith("Error: ")
        assert len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "permission denied. Change its permissions, or choose another place."),
        (errno.ENOSPC, "no space left on device. Free some space, or choose another disk."),
        (errno.EROFS, "read-only file system. Choose another place."),
    ],
)
def test_an_unwritable_output_is_an_error_of_one_sentence(number, message, composite, tmp_path, capsys, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    data, output = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "metrics.json"
    words = ("evaluate", composite, data, "--limit", 1, "--timed-outputs", 0, "--max-new-tokens", 2)
    assert run("evaluate", "no/model", data, "--output", f"{data}/metrics.json") == 1  # before any work
    assert f"Error: {data}/metrics.json cannot be written: Not a directory. Choose" in capsys.readouterr().err
    monkeypatch.setattr(Path, "write_text", fail)
    assert run(*words, "--output", output) == 1
    printed = capsys.readouterr()
    assert printed.err == f"Error: {output}: {message}\n"
    assert "chrf" in printed.out  # the result, which took long


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("a\nb."), "The command failed: a b. Set LLM2SLM_DEBUG=1 to see where."),
        (NotImplementedError(), "The command failed: NotImplementedError. Set LLM2SLM_DEBUG=1 to see where."),
        (MemoryError(), "There is not enough memory. Take smaller batches"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "There is not enough"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "There is not enough memory."),
    ],
)
def test_an_error_of_a_library_is_one_sentence(error, message, tmp_path, capsys, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("modeling_llm2slm.training.recipe.load_recipe", fail)
    assert run("train", tmp_path / "recipe.yaml") == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"Error: {message}")
    assert printed.count("\n") == 1


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("LLM2SLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        llm2slm.main(["train", "no.yaml"])


def test_a_process_of_its_own_prints_one_sentence_and_exits_with_1(tmp_path):
    result = run_in_new_process("train", str(tmp_path / "no.yaml"), env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 1
    assert result.stderr.startswith("Error: There is no recipe")
    assert result.stdout == ""
