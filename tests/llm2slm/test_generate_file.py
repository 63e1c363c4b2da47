"""`llm2slm generate --file ... --output ...`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import PROMPTS, write_checkpoint, write_pairs
from tests.support.commands import run


REPEATED = [PROMPTS[0], *PROMPTS, PROMPTS[0], PROMPTS[3]]  # 8 distinct prompts in 11 rows


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("checkpoint"))


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
        assert "3 prompts occurred before" in printed
        assert "40 tokens" in printed
        assert "tokens/s" in printed
    assert (folder / "a.txt").read_text().splitlines() == alone
    assert (folder / "b.de").read_text().splitlines() == alone
    assert [json.loads(line)["mt"] for line in (folder / "c.jsonl").read_text().splitlines()] == alone
    assert run("generate", composite, "--file", data, "--prompt-column", "source", *words[:2]) == 0
    assert capsys.readouterr().out.splitlines() == alone


def test_samples_of_a_seed_repeat(composite: str, prompts: Path) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        output = prompts.with_name(f"{len(texts)}.txt")
        words = ["--sample", "--temperature", "2", "--seed", seed, "--max-new-tokens", "5"]
        assert run("generate", composite, "--file", prompts, "--output", output, *words) == 0
        texts.append(output.read_text())
    assert texts[0] == texts[1] != texts[2]
    assert Counter(texts[0].splitlines())[texts[0].splitlines()[0]] < 3


def test_batch_tokens_need_files(composite: str, capsys: Any) -> None:
    assert run("generate", composite, "src1", "--batch-tokens", 10) == 2
    assert "--batch-tokens" in capsys.readouterr().err
