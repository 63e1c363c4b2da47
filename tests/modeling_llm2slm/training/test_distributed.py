"""Training in two processes, with the model copied (DDP) or sharded (FSDP2): the losses are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSeq2SeqLM

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.inference.factory import describe_source
from modeling_llm2slm.states.encoding import encode
from tests.support.checkpoints import write_checkpoint, write_pairs, write_parts
from tests.support.common import PROMPTS, build_model, make_labels, pad_prompts
from tests.support.sharding import shard


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"),
]

STEPS = 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def batch_of(rows: slice) -> dict[str, torch.Tensor]:
    """Return prompts of unequal lengths, and targets without padding: every process has the same number of tokens."""
    batch = {**pad_prompts([*PROMPTS, PROMPTS[1]]), "labels": make_labels(4, 6).clamp(min=2)}
    return {name: tensor[rows] for name, tensor in batch.items()}


def without_dropout(model: LLM2SLMForConditionalGeneration) -> LLM2SLMForConditionalGeneration:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def train_steps(model: Any, rows: slice, stored: bool) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        batch = batch_of(rows)
        if stored:
            states = torch.sin(torch.arange(4 * 12 * 24.0)).view(4, 12, 24)
            batch["llm_hidden_states"] = states[rows]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def sharded_worker(rank: int, port: int, folder: str, fusion: str, dtype: str | None, stored: bool) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = make_model(fusion, dtype)
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shard(model)
    held = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert parameter.numel() == whole[name]
        held += parameter.to_local().numel()
    assert 0.4 < held / sum(whole.values()) < 0.6
    losses = train_steps(model, slice(2 * rank, 2 * rank + 2), stored)
    weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save({"losses": losses, "weights": weights}, f"{folder}/result.pt")
    dist.destroy_process_group()


def saving_worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = LLM2SLMForConditionalGeneration.from_pretrained(f"{folder}/start").eval()
    model.config.llm_source = describe_source(f"{folder}/start")
    shard(model)
    with torch.no_grad():
        prompt = model.encode_prompt(**pad_prompts(PROMPTS)).last_hidden_state
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        model.save_pretrained(f"{folder}/lean", state_dict=state, include_llm=False)
        torch.save(prompt, f"{folder}/prompt.pt")
    assert isinstance(model, FSDPModule)
    dist.destroy_process_group()


def test_sharded_model_encodes_and_saves_lean_checkpoints(tmp_path: Path) -> None:
    model = build_model("add").eval()
    model.save_pretrained(tmp_path / "start")
    mp.spawn(saving_worker, (free_port(), str(tmp_path)), nprocs=2)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "lean").eval()
    with torch.no_grad():
        expected = model.encode_prompt(**pad_prompts(PROMPTS)).last_hidden_state
        found = loaded.encode_prompt(**pad_prompts(PROMPTS)).last_hidden_state
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.load(tmp_path / "prompt.pt", weights_only=True), expected)
    config = json.loads((tmp_path / "lean" / "config.json").read_text())
    assert config["lean"]
    name = "modeling_llm2slm.LLM2SLMForConditionalGeneration"
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == name
    assert (tmp_path / "lean" / "modeling_llm2slm.py").is_file()


def make_model(fusion: str, dtype: str | None) -> LLM2SLMForConditionalGeneration:
    model = without_dropout(build_model(fusion))
    if dtype is not None:
        model.encoder.llm.to(getattr(torch, dtype))
    return model


@pytest.mark.parametrize(
    ("fusion", "dtype", "stored"),
    [("add", None, False), ("replace", None, False), ("add_shared", "bfloat16", False), ("add", "bfloat16", True)],
)
def test_sharded_model_has_the_losses_of_a_whole_one(
    fusion: str, dtype: str | None, stored: bool, tmp_path: Path
) -> None:
    alone = make_model(fusion, dtype)
    expected = train_steps(alone, slice(0, 4), stored)
    mp.spawn(sharded_worker, (free_port(), str(tmp_path), fusion, dtype, stored), nprocs=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["losses"] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    llm, slm, tokenizer = write_parts(tmp_path)
    config = json.loads(Path(slm).read_text())
    Path(slm).write_text(json.dumps({**config, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}))
    build(llm, slm, llm_tokenizer=tokenizer).save_pretrained(tmp_path / "start")
    data = write_pairs(tmp_path / "pairs.jsonl")
    return {
        "model": str(tmp_path / "start"), "train_data": data, "validation_data": data, "metric": "chrf",
        "generation": {"max_new_tokens": 6}, "learning_rate": 3e-3, "num_train_epochs": 3, "logging_steps": 1,
        "train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 3,
    }  # fmt: skip


def launch(recipe: dict[str, Any], folder: Path, processes: int, **overrides: Any) -> dict[str, Any]:
    """Train by `accelerate launch`, or alone in one process, four examples a step; return the report."""
    path = folder.with_suffix(".yaml")
    batch = {"per_device_train_batch_size": 4 // processes, "output_dir": str(folder)}
    path.write_text(yaml.safe_dump({**recipe, **batch, **overrides}))
    command = [sys.executable, "-m", "llm2slm", "train", str(path)]
    if processes > 1:
        # `--multi_gpu` is how accelerate spells several processes; without a GPU these are on the CPU, with gloo.
        options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        options += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", *command[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, timeout=250,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "training.json").read_text())


def losses_of(report: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in report["log"] if "loss" in row]


@pytest.mark.parametrize("how", ["running LLM", "stored states", "adapter", "streamed"])
def test_copied_models_have_the_losses_of_one(recipe: dict[str, Any], tmp_path: Path, how: str) -> None:
    if how == "stored states":
        encode(recipe["model"], [recipe["train_data"]], tmp_path / "states")
        recipe["llm_states"] = str(tmp_path / "states")
    elif how == "adapter":
        recipe["lora"] = {"r": 4}
    elif how == "streamed":
        recipe |= {"streaming": True, "max_steps": 6, "shuffle_buffer": 8}
    alone = launch(recipe, tmp_path / "alone", 1)
    together = launch(recipe, tmp_path / "together", 2)
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-3)
    assert len(losses_of(alone)) == 6
    assert together["best_metric"] == pytest.approx(alone["best_metric"], rel=1e-2)
    weights = [AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict() for name in ("alone", "together")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=1e-3)


def test_resumed_run_of_copies_has_the_same_losses(recipe: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of an epoch, where accelerate does not set the epoch of a wrapped sampler."""
    recipe |= {"metric": "loss", "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    recipe |= {"num_train_epochs": 4, "save_total_limit": 10}
    whole = launch(recipe, tmp_path / "whole", 2)
    launch(recipe, tmp_path / "parts", 2)
    # As if the run had been killed after step 3: later checkpoints are not complete, and there is no report.
    for name in ("checkpoint-6", "checkpoint-8"):
        (tmp_path / "parts" / name / "trainer_state.json").unlink(missing_ok=True)
    (tmp_path / "parts" / "training.json").unlink()
    again = launch(recipe, tmp_path / "parts", 2)
    assert again["resumed_at_step"] == 3
    assert losses_of(again) == losses_of(whole)


def test_slm_alone_trains_in_two_processes(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    recipe = {"train_data": data, "max_steps": 1, "model": write_checkpoint("slm", tmp_path), "logging_steps": 1}
    assert launch(recipe, tmp_path / "out", 2)["steps"] == 1
