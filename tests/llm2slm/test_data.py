"""Commands that prepare training: `encode` and `distill`."""

from __future__ import annotations

import pytest

from modeling_llm2slm.states.store import StateStore, is_complete
from tests.support.checkpoints import write_checkpoint, write_pairs
from tests.support.commands import kill_when, run


def test_stored_hidden_states_train_a_model(composite, recipe, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    assert run("encode", composite, data, "--output", tmp_path / "states") == 0
    printed = capsys.readouterr()
    assert "8 different prompts of 34 tokens, 24 numbers each in bfloat16: 1.6 kB." in printed.err
    assert f"--llm-states {tmp_path / 'states'}" in printed.out
    assert run("train", recipe, "--llm-states", tmp_path / "states") == 0
    assert run("generate", tmp_path / "out", "src1", "--max-new-tokens", 3) == 0


def test_outputs_of_an_llm_train_a_model(composite, recipe, tmp_path, capsys):
    llm = write_checkpoint("llm", tmp_path / "parts")
    words = ("distill", llm, tmp_path / "pairs.jsonl", "--output", tmp_path / "d.jsonl", "--max-new-tokens", 4)
    assert run(*words) == 0
    assert "8 examples are in" in capsys.readouterr().out
    data = ("--train-data", tmp_path / "d.jsonl", "--target-column", "target,llm_output")
    assert run("train", recipe, *data) == 0


@pytest.mark.slow
def test_killed_runs_resume(tmp_path):
    examples = [{"prompt": f"src{i % 100} src{i // 100}"} for i in range(3000)]
    data, llm = write_pairs(tmp_path / "many.jsonl", examples), write_checkpoint("llm", tmp_path)
    composite = write_checkpoint("llm2slm", tmp_path)
    states, outputs = tmp_path / "states", tmp_path / "outputs.jsonl"
    encode = ("encode", composite, data, "--output", states, "--batch-size", 1)
    arguments = f"{composite!r}, [{data!r}], {str(states)!r}, EncodeSettings(batch_size=1, shard_bytes=5000)"
    imports = "from modeling_llm2slm.states.encoding import EncodeSettings, encode"
    code = f"{imports}; encode({arguments})"
    kill_when(lambda: len(list(states.glob("states-*"))) > 3, "-c", code)
    shards = {shard: shard.stat().st_mtime_ns for shard in states.glob("states-*")}
    distill = ("distill", llm, data, "--output", outputs, "--num-beams", 1, "--max-new-tokens", 3)
    part = tmp_path / "outputs.jsonl.part"
    kill_when(lambda: part.exists() and part.stat().st_size > 5000, "-m", "llm2slm", *distill)
    assert not outputs.exists()
    assert not is_complete(states)
    assert run(*encode) == 0
    assert {shard: shard.stat().st_mtime_ns for shard in shards} == shards
    assert run(*distill) == 0
    assert len(outputs.read_text().splitlines()) == len(examples)
    assert len(StateStore(states)) == len({row["prompt"] for row in examples})
