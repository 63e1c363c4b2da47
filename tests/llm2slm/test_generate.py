"""The command `generate`."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.files import GenerationReport
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import GenerateFileSettings
from tests.support.checkpoints import PROMPTS, sample_by_default, write_pairs
from tests.support.commands import run
from tests.support.conversions import change_weights


REPEATED = [PROMPTS[0], *PROMPTS, PROMPTS[0], PROMPTS[3]]  # 8 distinct prompts in 11 rows


def test_prompts_in_arguments_file_and_standard_input_give_the_same_outputs(composite, tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:3]) + "\n")
    outputs = []
    for words in (PROMPTS[:3], ["--file", prompts], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO(prompts.read_text()))
        assert run("generate", composite, *words, "--max-new-tokens", 5) == 0
        outputs.append(capsys.readouterr().out)
    expected = TextToText.from_pretrained(composite).generate(PROMPTS[:3], max_new_tokens=5)
    assert outputs == ["".join(f"{text}\n" for text in expected)] * 3


def test_each_piece_is_shown_when_it_is_generated(composite, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(TextToText, "stream", lambda *_, **__: (piece for piece in ("one ", "two")))
    written = io.StringIO()
    monkeypatch.setattr(written, "flush", lambda: seen.append(written.getvalue()))
    monkeypatch.setattr(sys, "stdout", written)
    assert run("generate", composite, "src1") == 0
    assert seen == ["one ", "one two", "one two\n"]


def test_batches_and_beams_keep_the_order_of_prompts(composite, capsys):
    assert run("generate", composite, *PROMPTS, "--batch-size", 3, "--num-beams", 2, "--max-new-tokens", 5) == 0
    expected = TextToText.from_pretrained(composite).generate(PROMPTS, num_beams=2, max_new_tokens=5)
    assert capsys.readouterr().out.splitlines() == expected


def test_a_seed_makes_samples_repeatable(composite, capsys):
    words = ("generate", composite, *PROMPTS[:4], "--sample", "--temperature", 2, "--max-new-tokens", 8)
    outputs = []
    for seed in (1, 1, 2):
        assert run(*words, "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_any_whole_number_is_a_seed(composite, capsys):
    for seed in (-1, 2**63 - 1):
        assert run("generate", composite, "src1", "--sample", "--seed", seed, "--max-new-tokens", 2) == 0
    capsys.readouterr()


def test_nothing_is_sampled_without_the_option(composite, tmp_path, capsys):
    model = Path(shutil.copytree(composite, tmp_path / "model"))
    sample_by_default(model)
    expected = TextToText.from_pretrained(composite).generate(PROMPTS, max_new_tokens=5)
    assert run("generate", model, *PROMPTS, "--batch-size", 8, "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_an_output_file_has_one_output_on_each_line(composite, tmp_path):
    assert run("generate", composite, *PROMPTS, "--output", tmp_path / "outputs.txt", "--max-new-tokens", 5) == 0
    assert len((tmp_path / "outputs.txt").read_text().splitlines()) == len(PROMPTS)


def test_an_output_that_cannot_be_written_is_an_error_before_the_work(tmp_path, capsys):
    assert run("generate", "no/model", "src1", "--output", tmp_path) == 1
    assert f"{tmp_path} cannot be written: it is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ((), (128, 4096)),
        (("--batch-size", 128), (128, 4096)),
        (("--batch-size", 3, "--batch-tokens", 50), (3, 50)),
    ],
)
def test_both_limits_of_a_batch_reach_generate_file(words, limits, tmp_path, monkeypatch):
    given: list[GenerateFileSettings] = []
    monkeypatch.setattr(
        "modeling_llm2slm.inference.files.generate_file",
        lambda model, data, output, settings, **_: given.append(settings) or GenerationReport(0, 0, 0, 0, 0.0),
    )
    (tmp_path / "a.txt").write_text("src1\n")
    assert run("generate", "model", "--file", tmp_path / "a.txt", "--output", tmp_path / "b.txt", *words) == 0
    assert [(settings.batch_size, settings.batch_tokens) for settings in given] == [limits]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("src1", "--batch-tokens", 50), "--batch-tokens belongs to --file with --output"),
        (("src1", "--output", "OUT.jsonl", "--column", "mt"), "--column belongs to --file with --output"),
        (("--file", "FILE", "--overwrite"), "--overwrite belongs to --output"),
        (("src1", "--prompt-column", "source"), "--prompt-column belongs to --file"),
        (("src1", "--skip-bad-rows"), "--skip-bad-rows belongs to --file"),
        (
            ("--file", "FILE", "--output", "OUT.txt", "--column", "mt"),
            "--column needs an --output that ends in .jsonl",
        ),
        (("--file", "FILE", "--split", "test"), "No such option: --split"),
    ],
)
def test_options_without_effect_are_refused_before_the_work(words, message, tmp_path, capsys):
    (tmp_path / "FILE").write_text("src1\n")
    named = [tmp_path / word if str(word).startswith(("FILE", "OUT")) else word for word in words]
    assert run("generate", "no/model", *named) == 2
    assert message in capsys.readouterr().err


def test_a_file_becomes_a_file_of_the_same_outputs(composite, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words = ("--file", tmp_path / "prompts.txt", "--output", tmp_path / "outputs.txt", "--max-new-tokens", 5)
    assert run("generate", composite, *words) == 0
    printed = capsys.readouterr()
    assert "8 outputs are in" in printed.out
    assert "Generating: 8 of 8 outputs" in printed.err
    expected = TextToText.from_pretrained(composite).generate(PROMPTS, max_new_tokens=5)
    assert (tmp_path / "outputs.txt").read_text().splitlines() == expected


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in REPEATED))
    return path


def test_files_of_every_format(composite: str, prompts: Path, capsys: Any) -> None:
    model = TextToText.from_pretrained(composite)
    alone = [model.generate([prompt], max_new_tokens=5)[0] for prompt in REPEATED]
    folder = prompts.parent
    data = write_pairs(folder / "rows.jsonl", [{"source": prompt} for prompt in REPEATED])
    (folder / "prompts.en").write_text(prompts.read_text())
    words = ["--max-new-tokens", "5", "--batch-tokens", "20"]
    for file, output, more in (
        (prompts, "a.txt", []),
        (folder / "prompts.en", "b.de", []),
        (data, "c.jsonl", ["--prompt-column", "source", "--column", "mt"]),
    ):
        assert run("generate", composite, "--file", file, "--output", folder / output, *words, *more) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "11" in printed
        assert str(folder / output) in printed
        assert "3 prompts were repeated" in printed
        assert "were kept from an interrupted run" not in printed
        assert "40 tokens" in printed
        assert "tokens/s" in printed
    assert (folder / "a.txt").read_text().splitlines() == alone
    assert (folder / "b.de").read_text().splitlines() == alone
    assert [json.loads(line)["mt"] for line in (folder / "c.jsonl").read_text().splitlines()] == alone
    assert run("generate", composite, "--file", data, "--prompt-column", "source", *words[:2]) == 0
    assert capsys.readouterr().out.splitlines() == alone


def test_samples_of_a_seed_repeat_in_files(composite: str, prompts: Path) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        output = prompts.with_name(f"{len(texts)}.txt")
        words = ["--sample", "--temperature", "2", "--seed", seed, "--max-new-tokens", "5"]
        assert run("generate", composite, "--file", prompts, "--output", output, *words) == 0
        texts.append(output.read_text())
    assert texts[0] == texts[1] != texts[2]
    assert Counter(texts[0].splitlines())[texts[0].splitlines()[0]] < 3


@pytest.mark.parametrize("options", [(), ("--batch-size", 2), ("--num-beams", 2), ("--output", "out.txt"), ("file",)])
def test_blank_outputs_cause_one_warning(composite, tmp_path, monkeypatch, caplog, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToText, "stream", lambda *_, **__: (piece for piece in (" ", "")))
    monkeypatch.setattr(TextToText, "generate", lambda self, prompts, *_, **__: [" "] * len(prompts))
    monkeypatch.setattr(TextToText, "write", lambda self, inputs, **_: [[1]] * len(inputs["input_ids"]))
    write_pairs(tmp_path / "pairs.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:3]])
    words = PROMPTS[:3] if options != ("file",) else ["--file", "pairs.jsonl", "--output", "out.jsonl"]
    assert run("generate", composite, *words, *(options if options != ("file",) else ())) == 0
    messages = [record.getMessage() for record in caplog.records if "blank" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("3 of 3 outputs are blank")


def test_weights_that_are_not_finite_are_loaded_only_on_request(composite, tmp_path, capsys):
    model = Path(shutil.copytree(composite, tmp_path / "model"))
    change_weights(lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])(model)
    assert run("generate", model, "src1") == 1
    assert "holds values that are not finite" in capsys.readouterr().err
    assert run("generate", model, "src1", "--allow-nonfinite", "--max-new-tokens", 2) == 0
