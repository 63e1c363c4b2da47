"""The `llm2slm` command: what it does, and that whatever is wrong gives one sentence and leaves nothing behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForSeq2SeqLM

import llm2slm
from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.batching import BatchLimits
from modeling_llm2slm.inference.files import GenerationReport
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.store import StateStore, is_complete
from tests.support.checkpoints import PAIRS, PROMPTS, sample_by_default, write_checkpoint, write_pairs, write_parts


COMMANDS = (
    "build", "train", "encode", "distill", "plan", "speedup", "export", "benchmark", "generate", "serve", "evaluate",
    "info", "card", "convert",
)  # fmt: skip
CONVERSIONS = ("compose", "lean", "full", "merge", "split", "import")


def run(*arguments: Any) -> int:
    """Runs the command and returns its exit status."""
    try:
        llm2slm.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, capsys):
    # Consoles are made when the module is imported; a test has its own output and a width that wraps nothing.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(llm2slm, "out", llm2slm.Console(width=200))
    monkeypatch.setattr(llm2slm, "err", llm2slm.Console(stderr=True, width=200))


@pytest.fixture(scope="module")
def composite(tmp_path_factory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("composite"))


def in_a_new_process(*arguments: str, code: str | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "llm2slm", *arguments])]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False, **kwargs)


class TestHelp:
    def test_nothing_heavy_is_imported(self):
        code = "import sys, llm2slm; llm2slm.main(['train', '--help'])"
        heavy = "set(sys.modules) & {'torch', 'transformers', 'datasets', 'numpy', 'modeling_llm2slm'}"
        code = f"import atexit; atexit.register(lambda: print('heavy:', sorted({heavy}))); {code}"
        result = in_a_new_process(code=code)
        assert result.returncode == 0
        assert "heavy: []" in result.stdout

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself_by_an_example(self, command, capsys):
        assert run(command, "--help") == 0
        help_text = capsys.readouterr().out
        assert f"llm2slm {command}" in help_text or command in {"info", "convert"}
        assert "--help" in help_text

    @pytest.mark.parametrize("command", CONVERSIONS)
    def test_every_conversion_explains_itself_by_an_example(self, command, capsys):
        assert run("convert", command, "--help") == 0
        assert f"llm2slm convert {command}" in capsys.readouterr().out

    def test_all_commands_are_listed(self, capsys):
        assert run("--help") == 0
        listed = capsys.readouterr().out
        assert all(command in listed for command in COMMANDS)


class TestBuild:
    def test_two_configs_make_a_composite(self, tmp_path, capsys):
        llm, slm, tokenizer = write_parts(tmp_path)
        assert run("build", tmp_path / "new", "--llm", llm, "--slm", slm, "--llm-tokenizer", tokenizer) == 0
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
        assert isinstance(model, LLM2SLMForConditionalGeneration)
        assert (model.config.fusion, model.config.shared_tokenizer) == ("add", True)
        assert "projector" in capsys.readouterr().out

    def test_trained_parts_are_taken_as_they_are(self, tmp_path):
        llm, slm = (write_checkpoint(kind, tmp_path) for kind in ("llm", "slm"))
        assert run("build", tmp_path / "new", "--llm", llm, "--slm", slm, "--fusion", "replace") == 0
        built = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
        assert built.config.fusion == "replace"
        for path, part in ((llm, built.encoder.llm), (slm, built.decoder)):
            weights = TextToText.from_pretrained(path).model.state_dict()
            assert all(bool((tensor == weights[name]).all()) for name, tensor in part.state_dict().items())

    def test_the_seed_decides_the_random_weights(self, tmp_path):
        _, slm, tokenizer = write_parts(tmp_path)
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert run("build", tmp_path / name, "--slm", slm, "--slm-tokenizer", tokenizer, "--seed", seed) == 0
        a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
        assert a == b
        assert a != c

    def test_parts_that_do_not_fit_are_an_error(self, tmp_path, capsys):
        llm, slm, tokenizer = write_parts(tmp_path)
        words = ("build", tmp_path / "new", "--llm", llm, "--slm", slm, "--llm-tokenizer", tokenizer)
        assert run(*words, "--fusion", "mix") == 1
        assert "`fusion` is 'mix'" in capsys.readouterr().err
        config = json.loads(Path(slm).read_text())
        Path(slm).write_text(json.dumps({**config, "vocab_size": 5}))
        assert run(*words) == 1
        assert "has a vocabulary of 5, but the tokenizer has" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    def test_a_preset_names_both_models(self, tmp_path, capsys):
        pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
        *_, tokenizer = write_parts(tmp_path)
        assert run("build", tmp_path / "new", "--preset", "huge", "--llm-tokenizer", tokenizer) == 1
        assert "no preset 'huge'; there are" in capsys.readouterr().err
        assert run("build", tmp_path / "new", "--preset", "tiny", "--llm-tokenizer", tokenizer) == 0
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new").config.model_type == "llm2slm"

    def test_what_is_there_is_replaced_only_on_request(self, tmp_path, capsys):
        _, slm, tokenizer = write_parts(tmp_path)
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mine").touch()
        words = ("build", tmp_path / "new", "--slm", slm, "--slm-tokenizer", tokenizer)
        assert run(*words) == 1
        assert "add --overwrite" in capsys.readouterr().err
        assert run(*words, "--overwrite") == 0
        assert not (tmp_path / "new" / "mine").exists()


@pytest.fixture
def recipe(composite, tmp_path) -> Path:
    data = write_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "recipe.yaml"
    fields = {
        "model": composite, "train_data": data, "validation_data": data, "output_dir": str(tmp_path / "out"),
        "metric": "bleu", "generation": {"max_new_tokens": 4}, "max_steps": 2, "per_device_train_batch_size": 4,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(fields))
    return path


class TestTrain:
    def test_a_recipe_makes_a_model_that_generates(self, recipe, tmp_path, capsys):
        assert run("train", recipe) == 0
        assert "Trained 2 steps" in capsys.readouterr().out
        assert run("generate", tmp_path / "out", "src1", "--max-new-tokens", 3) == 0
        assert run("info", tmp_path / "out") == 0
        assert "Trained 2 steps" in capsys.readouterr().out

    def test_every_field_is_an_option(self, recipe, tmp_path):
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
        assert record["recipe"]["disable_tqdm"] == "true"
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_a_run_killed_again_and_again_has_the_losses_of_a_whole_one(self, recipe, tmp_path):
        words = ("train", recipe, "--max_steps", "60", "--save_strategy", "steps", "--save_steps", "2")
        words += ("--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "3", "--metric", "loss")
        words += ("--save_total_limit", "100", "--train_sampling_strategy", "group_by_length")
        assert run(*words, "--output_dir", tmp_path / "whole") == 0
        for seen in (2, 9, 16):
            kill_when(
                lambda seen=seen: len(list((tmp_path / "out").glob("checkpoint-*"))) > seen, "-m", "llm2slm", *words
            )
            assert not (tmp_path / "out" / "config.json").exists()
        assert run(*words) == 0
        records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("out", "whole")]
        assert records[0]["resumed_at_step"] >= 2
        losses = [[(row["step"], row["loss"]) for row in each["log"] if "loss" in row] for each in records]
        assert losses[0] == losses[1]
        assert len(losses[0]) > 20
        models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
        assert models[0] == models[1]


def kill_when(reached: Any, *words: Any) -> None:
    """Starts Python in a process of its own and kills it as soon as something is so."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the tests: more threads add in another order
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, stderr=subprocess.DEVNULL)
    while not reached():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


class TestEncodeAndDistill:
    def test_states_of_a_store_train_a_model(self, composite, recipe, tmp_path, capsys):
        data = tmp_path / "pairs.jsonl"
        assert run("encode", composite, data, "--output", tmp_path / "states") == 0
        printed = capsys.readouterr()
        assert "8 different prompts of 34 tokens, 24 numbers each in bfloat16: 1.63 kB." in printed.err
        assert f"--llm_states {tmp_path / 'states'}" in printed.out
        assert run("train", recipe, "--llm_states", tmp_path / "states") == 0
        assert run("generate", tmp_path / "out", "src1", "--max-new-tokens", 3) == 0

    def test_answers_of_an_llm_train_a_model(self, composite, recipe, tmp_path, capsys):
        llm = write_checkpoint("llm", tmp_path / "parts")
        words = ("distill", llm, tmp_path / "pairs.jsonl", "--output", tmp_path / "d.jsonl", "--max-new-tokens", 4)
        assert run(*words) == 0
        assert "8 rows are in" in capsys.readouterr().out
        data = ("--train_data", tmp_path / "d.jsonl", "--target_column", "answer,llm_output")
        assert run("train", recipe, *data) == 0

    @pytest.mark.slow
    def test_killed_runs_go_on(self, tmp_path):
        pairs = [{"prompt": f"src{i % 100} src{i // 100}"} for i in range(3000)]
        data, llm = write_pairs(tmp_path / "many.jsonl", pairs), write_checkpoint("llm", tmp_path)
        composite = write_checkpoint("llm2slm", tmp_path)
        states, answers = tmp_path / "states", tmp_path / "answers.jsonl"
        encode = ("encode", composite, data, "--output", states, "--batch-size", 1)
        arguments = f"{composite!r}, [{data!r}], {str(states)!r}, batch_size=1, shard_bytes=5000"
        code = f"from modeling_llm2slm.states.encoding import encode; encode({arguments})"
        kill_when(lambda: len(list(states.glob("states-*"))) > 3, "-c", code)
        shards = {shard: shard.stat().st_mtime_ns for shard in states.glob("states-*")}
        distill = ("distill", llm, data, "--output", answers, "--num-beams", 1, "--max-new-tokens", 3)
        part = tmp_path / "answers.jsonl.part"
        kill_when(lambda: part.exists() and part.stat().st_size > 5000, "-m", "llm2slm", *distill)
        assert not answers.exists()
        assert not is_complete(states)
        assert run(*encode) == 0
        assert {shard: shard.stat().st_mtime_ns for shard in shards} == shards
        assert run(*distill) == 0
        assert len(answers.read_text().splitlines()) == len(pairs)
        assert len(StateStore(states)) == len({row["prompt"] for row in pairs})


class TestFirstDay:
    def test_a_plan_is_printed_and_written(self, tmp_path, capsys):
        pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
        llm, data = write_checkpoint("llm", tmp_path), write_pairs(tmp_path / "pairs.jsonl")
        words = ("plan", "--llm", llm, "--data", data, "--preset", "tiny", "--max-new-tokens", 4, "--batch-size", 1)
        assert run(*words, "--timed-prompts", 1, "--output", tmp_path / "plan.json") == 0
        printed = capsys.readouterr().out
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert f"{plan['candidates'][0]['speed_up']:.2f}" in printed
        assert plan["recommendation"] in printed
        assert all(word in printed for word in ("memory to train", "hours to encode", "1.63 kB", "--slm-tokenizer"))

    def test_prompts_become_a_model(self, tmp_path, capsys):
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

    def test_agreement_with_the_llm_is_printed(self, composite, tmp_path, capsys):
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:4]) + "\n")
        words = ("evaluate", composite, tmp_path / "prompts.txt", "--against", write_checkpoint("llm", tmp_path))
        assert run(*words, "--max-new-tokens", 3, "--worst", 2, "--output", tmp_path / "a.json") == 0
        result, printed = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
        assert f"{result['agreement']['chrf']:.2f}" in printed
        assert f"{result['speed_up']:.2f} times as fast" in printed
        assert len(result["worst"]) == 2


class TestGenerate:
    def test_arguments_file_and_standard_input_give_the_same(self, composite, tmp_path, capsys, monkeypatch):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS[:3]) + "\n")
        outputs = []
        for words in (PROMPTS[:3], ["--file", prompts], []):
            monkeypatch.setattr(sys, "stdin", io.StringIO(prompts.read_text()))
            assert run("generate", composite, *words, "--max-new-tokens", 5) == 0
            outputs.append(capsys.readouterr().out)
        expected = TextToText.from_pretrained(composite).generate(PROMPTS[:3], max_new_tokens=5)
        assert outputs == ["".join(f"{answer}\n" for answer in expected)] * 3

    def test_answers_come_as_they_are_written(self, composite, monkeypatch):
        seen: list[str] = []
        monkeypatch.setattr(TextToText, "stream", lambda *_, **__: iter(["one ", "two"]))
        output = io.StringIO()
        monkeypatch.setattr(output, "flush", lambda: seen.append(output.getvalue()))
        monkeypatch.setattr(llm2slm, "out", llm2slm.Console(file=output))
        assert run("generate", composite, "src1") == 0
        assert seen == ["one ", "one two", "one two\n"]

    def test_batches_and_beams_keep_the_order(self, composite, capsys):
        assert run("generate", composite, *PROMPTS, "--batch-size", 3, "--num-beams", 2, "--max-new-tokens", 5) == 0
        expected = TextToText.from_pretrained(composite).generate(PROMPTS, num_beams=2, max_new_tokens=5)
        assert capsys.readouterr().out.splitlines() == expected

    def test_a_seed_makes_samples_repeatable(self, composite, capsys):
        words = ("generate", composite, *PROMPTS[:4], "--sample", "--temperature", 2, "--max-new-tokens", 8)
        outputs = []
        for seed in (1, 1, 2):
            assert run(*words, "--seed", seed) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1] != outputs[2]

    def test_nothing_is_sampled_unless_asked_for(self, composite, tmp_path, capsys):
        model = Path(shutil.copytree(composite, tmp_path / "model"))
        sample_by_default(model)
        expected = TextToText.from_pretrained(composite).generate(PROMPTS, max_new_tokens=5)
        assert run("generate", model, *PROMPTS, "--batch-size", 8, "--max-new-tokens", 5) == 0
        assert capsys.readouterr().out.splitlines() == expected

    def test_an_output_file_holds_an_answer_a_line(self, composite, tmp_path):
        assert run("generate", composite, *PROMPTS, "--output", tmp_path / "answers.txt", "--max-new-tokens", 5) == 0
        assert len((tmp_path / "answers.txt").read_text().splitlines()) == len(PROMPTS)

    def test_an_output_that_cannot_be_written_is_told_before_any_answer(self, tmp_path, capsys):
        assert run("generate", "no/model", "src1", "--output", tmp_path) == 1
        assert f"{tmp_path} cannot be written: it is a folder" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "limits"),
        [
            ((), BatchLimits(128, 4096)),
            (("--batch-size", 128), BatchLimits(128, 4096)),
            (("--batch-size", 3, "--batch-tokens", 50), BatchLimits(3, 50)),
        ],
    )
    def test_both_limits_hold_from_file_to_file(self, words, limits, tmp_path, monkeypatch):
        given: list[BatchLimits] = []
        monkeypatch.setattr(
            "modeling_llm2slm.inference.files.generate_file",
            lambda model, data, output, settings, **_: (
                given.append(BatchLimits(settings.batch_size, settings.batch_tokens))
                or GenerationReport(0, 0, 0, 0, 0.0)
            ),
        )
        (tmp_path / "a.txt").write_text("src1\n")
        assert run("generate", "model", "--file", tmp_path / "a.txt", "--output", tmp_path / "b.txt", *words) == 0
        assert given == [limits]


def test_evaluate_prints_and_writes_the_same_numbers(composite, tmp_path, capsys):
    data, output = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "metrics.json"
    assert run("evaluate", composite, data, "--output", output, "--max-new-tokens", 4, "--timed-outputs", 2) == 0
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert result["pairs"] == len(PAIRS)
    assert result["data"] == "pairs.jsonl"
    assert f"{result['scores']['chrf']:.2f}" in printed
    assert result["signatures"]["bleu"] in printed


def test_benchmark_prints_a_table_of_each_cell(tmp_path, capsys):
    pytest.importorskip("psutil")
    (tmp_path / "sweep.yaml").write_text(
        "cells: [{preset: tiny, prompt: 8, answer: 3, repeats: 1, contestants: [slm, llm2slm]}]", encoding="utf-8"
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


def test_card_writes_scores_and_keeps_what_is_written_by_hand(composite, tmp_path, capsys):
    model = Path(shutil.copytree(composite, tmp_path / "model"))
    result = {"data": "test.jsonl", "pairs": 3, "scores": {"bleu": 12.345}, "signatures": {"bleu": "sig"}}
    (tmp_path / "metrics.json").write_text(json.dumps(result))
    words = ("card", model, "--evaluation", tmp_path / "metrics.json", "--language", "de", "--task", "translation")
    assert run(*words, "--license", "apache-2.0") == 0
    text = (model / "README.md").read_text()
    assert "12.35" in text
    assert "license: apache-2.0" in text
    assert "pipeline_tag: translation" in text
    (model / "README.md").write_text("my own")
    assert run(*words) == 1
    assert "was written by hand" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text("[]")
    assert run(*words) == 1
    assert "does not hold a result" in capsys.readouterr().err
    assert run("card", write_checkpoint("slm", tmp_path)) == 1
    assert "is not a composite" in capsys.readouterr().err


def test_conversions_print_one_table(composite, tmp_path, capsys):
    assert run("convert", "split", composite, tmp_path / "parts") == 0
    printed = capsys.readouterr().out
    assert "logits of the SLM, largest difference" in printed
    assert "projector.linear_1.weight" in printed
    assert run("generate", tmp_path / "parts" / "slm", "src1", "--max-new-tokens", 2) == 0
    assert run("convert", "split", composite, tmp_path / "parts") == 1
    assert "add --overwrite" in capsys.readouterr().err
    for option in ("--overwrite", "--force"):  # the second for scripts, and in no help
        assert run("convert", "split", composite, tmp_path / "parts", option) == 0
    assert run("convert", "split", "--help") == 0
    assert "--force" not in capsys.readouterr().out


def test_info_names_the_parts(composite, capsys):
    assert run("info", composite) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("LLM", "projector", "SLM", "used for each token"))


MODEL, DATA, RECIPE, OUT = "<model>", "<data>", "<recipe>", "<out>"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["generate", "no/such/model", "hello"], 1, "no/such/model cannot be loaded: there is no such folder"),
        (["generate", OUT, "hello"], 1, "cannot be loaded: there is no such folder"),
        (["generate", MODEL, "--file", "no.txt"], 1, "There is no file no.txt"),
        (["generate", MODEL, "hello", "--top-p", "0.5"], 2, "--sample"),
        (["generate", MODEL, "hello", "--sample", "--temperature", "0"], 2, "--temperature must be above 0"),
        (["generate", MODEL, "hello", "--num-beams", "0"], 2, "num-beams"),
        (["generate", MODEL, "hello", "--max-new-tokens", "500", "--output", OUT], 1, "64 positions"),
        (["generate"], 2, "model"),
        (["evaluate", MODEL, "no.jsonl", "--output", OUT], 1, "no data file no.jsonl"),
        (["evaluate", MODEL, DATA, "--target-column", "target", "--output", OUT], 1, "no column 'target'"),
        (["evaluate", MODEL, DATA, "--device", "moon", "--output", OUT], 1, "moon"),
        (["train", "no.yaml"], 1, "There is no recipe no.yaml"),
        (["train", RECIPE, "--max_step", "3"], 1, "Did you mean max_steps"),
        (["train", RECIPE, "--learning_rate", "fast", "--output_dir", OUT], 1, "learning_rate"),
        (["train", RECIPE, "--train_data", "no.csv", "--output_dir", OUT], 1, "no data file no.csv"),
        (["train", RECIPE, "--prompt_column", "x", "--output_dir", OUT], 1, "no column 'x'"),
        (["train", RECIPE, "--model", "no/such/model", "--output_dir", OUT], 1, "no/such/model cannot be loaded"),
        (["train", RECIPE, "stray"], 2, "stray"),
        (["build", OUT], 1, "nothing to build from"),
        (["build", OUT, "--llm", "no/such/model"], 1, "no/such/model cannot be loaded"),
        (["build", OUT, "--llm", "no.json", "--slm", "no.json"], 1, "There is no config file no.json"),
        (["build", OUT, "--preset", "no.json"], 1, "There is no config file no.json"),
        (["info", DATA], 1, "cannot be loaded"),
        (["card", MODEL, "--evaluation", "no.json"], 1, "There is no file no.json"),
        (["convert", "lean", MODEL, OUT], 1, "not known where the LLM comes from"),
        (["convert", "full", MODEL, OUT], 1, "is full already"),
        (["convert", "split", "no/such/model", OUT], 1, "no/such/model cannot be loaded"),
        (["convert", "compose", MODEL, MODEL, OUT], 1, "cannot be the LLM"),
        (["convert", "import", MODEL, OUT], 1, "not an encoder-decoder"),
        (["convert", "import", MODEL, OUT, "--mapping", "names.json"], 2, "--into"),
        (["convert", "merge", "no/such/adapter", OUT], 1, "no/such/adapter cannot be loaded"),
        (["inform"], 2, "inform"),
        (["encode", MODEL, "no.jsonl", "--output", OUT], 1, "no data file no.jsonl"),
        (["encode", "no/such/model", DATA, "--output", OUT], 1, "no/such/model cannot be loaded"),
        (["encode", MODEL, DATA, "--output", OUT, "--dtype", "int3"], 1, "dtype is 'int3'"),
        (["encode", MODEL, DATA, "--output", OUT, "--prompt-column", "x"], 1, "no column 'x'"),
        (["encode", MODEL, DATA], 2, "output"),
        (["distill", "no/such/model", DATA, "--output", f"{OUT}.jsonl"], 1, "no/such/model cannot be loaded"),
        (["convert", "lean", "no/such/model", OUT], 1, "no/such/model cannot be loaded: there is no such folder"),
        (["distill", MODEL, DATA, "--output", DATA], 1, "exists. Choose another file, or add --overwrite"),
        (["distill", MODEL, DATA, "--output", f"{OUT}.csv"], 1, "none of .jsonl"),
        (["train", RECIPE, "--llm_states", "no/store", "--output_dir", OUT], 1, "no/store is no store of LLM states"),
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
def test_what_is_wrong_gives_one_sentence_and_leaves_nothing(
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
def test_where_nothing_can_be_written_gives_one_sentence(number, message, composite, tmp_path, capsys, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    data, output = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "metrics.json"
    words = ("evaluate", composite, data, "--limit", 1, "--timed-outputs", 0, "--max-new-tokens", 2)
    assert run("evaluate", "no/model", data, "--output", f"{data}/metrics.json") == 1  # said before any work
    assert f"Error: {data}/metrics.json cannot be written: Not a directory. Choose" in capsys.readouterr().err
    monkeypatch.setattr(Path, "write_text", fail)
    assert run(*words, "--output", output) == 1
    told = capsys.readouterr()
    assert told.err == f"Error: {output}: {message}\n"
    assert "chrf" in told.out  # the result, which took long


def test_lines_of_text_are_scored_against_an_llm_only(composite, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("src1\n")
    assert run("evaluate", composite, tmp_path / "prompts.txt") == 1
    assert "prompts.txt has prompts and no answers" in capsys.readouterr().err


def test_answers_that_are_all_the_same_have_no_worst(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("src1\n")
    llm = write_checkpoint("llm", tmp_path)
    words = ("evaluate", llm, tmp_path / "prompts.txt", "--against", llm, "--max-new-tokens", 2)
    assert run(*words, "--timed-outputs", 0) == 0
    assert "chrF 100" not in capsys.readouterr().out


def test_a_corrupt_checkpoint_gives_one_sentence(tmp_path, capsys):
    path = Path(write_checkpoint("slm", tmp_path))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    assert run("info", path) == 1
    assert capsys.readouterr().err.startswith(f"Error: {path} cannot be loaded")


def test_build_from_what_does_not_load_gives_one_sentence(tmp_path, capsys):
    """A wrong dtype, and an LLM whose file was cut."""
    llm, slm, tokenizer = write_parts(tmp_path)
    assert run("build", tmp_path / "llm", "--llm", llm, "--llm-tokenizer", tokenizer) == 0
    capsys.readouterr()
    start = ("build", tmp_path / "out", "--llm", tmp_path / "llm", "--slm", slm, "--slm-tokenizer", tokenizer)
    assert run(*start, "--encoder-dtype", "bf17") == 1
    assert "cannot be put together" in capsys.readouterr().err
    weights = tmp_path / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(*start) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("LLM2SLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        llm2slm.main(["train", "no.yaml"])


def test_a_real_process_exits_as_it_should(tmp_path):
    result = in_a_new_process("train", str(tmp_path / "no.yaml"), env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 1
    assert result.stderr.startswith("Error: There is no recipe")
    assert result.stdout == ""
