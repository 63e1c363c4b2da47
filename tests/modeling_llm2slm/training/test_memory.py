"""Memory counts: of the right parameters, and close to what a process takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from modeling_llm2slm import LLM2SLMConfig
from modeling_llm2slm.training.memory import TrainingSetup, generation_memory, training_memory
from tests.support.common import FUSIONS, build_model, gpt2_config, t5_config


SETUP = TrainingSetup(batch_size=3, prompt_length=10, output_length=7)


def config(**overrides: Any) -> LLM2SLMConfig:
    return LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(), **overrides)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_weights_are_counted_as_llm_trained_or_frozen(fusion: str) -> None:
    model = build_model(fusion).train()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    memory = training_memory(model.config, SETUP)
    assert memory["llm"] == sum(p.nbytes for p in model.encoder.llm.parameters())
    assert (memory["trained"], memory["gradients"], memory["optimizer"]) == (trained, trained, 2 * trained)
    assert memory["frozen"] == 0
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    stored = training_memory(model.config, replace(SETUP, llm_states=True))
    table = model.encoder.llm.get_input_embeddings().weight.nbytes if fusion == "add" else 0
    assert stored["llm"] == table
    assert stored["llm_activations"] == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_each_setting_saves_the_memory_it_should() -> None:
    whole = training_memory(config(), SETUP)
    lora = training_memory(config(), replace(SETUP, lora={"r": 2}))
    assert lora["trained"] < whole["trained"] / 2
    assert lora["frozen"] > 0
    assert lora["gradients"] == lora["trained"]
    half = training_memory(config(encoder_dtype="bfloat16"), SETUP)
    assert half["llm"] * 2 == whole["llm"]
    deep = LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(n_layer=12))
    kept, again = (training_memory(deep, replace(SETUP, gradient_checkpointing=flag)) for flag in (False, True))
    assert again["activations"] < kept["activations"] / 3
    assert training_memory(config(), replace(SETUP, bf16=True))["activations"] < whole["activations"]
    assert training_memory(config(), replace(SETUP, optimizer="adafactor"))["optimizer"] < whole["optimizer"] / 5
    assert training_memory(config(), replace(SETUP, shards=4))["optimizer"] == whole["optimizer"] // 4


@pytest.mark.parametrize("decoder", [gpt2_config(), t5_config(vocab_size=99, d_model=32)])
def test_generation_needs_weights_and_a_cache(decoder: Any) -> None:
    composite = LLM2SLMConfig(encoder=t5_config(), decoder=decoder)
    memory = generation_memory(composite, batch_size=2, prompt_length=10, output_length=6)
    layers, width = (1, 24) if decoder.is_encoder_decoder else (2, 32)
    assert memory["cache"] == 2 * layers * 2 * 16 * width * 4
    assert memory["total"] == memory["weights"] + memory["cache"]


MEASURE = """
import threading, time, torch
from pathlib import Path
from transformers import GPT2Config, T5Config
from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.training.memory import TrainingSetup, training_memory

torch.set_num_threads(1)
slm = GPT2Config(n_layer=4, n_embd=256, n_head=8, vocab_size=20000, bos_token_id=0, eos_token_id=0)
config = LLM2SLMConfig(encoder=T5Config(d_model=256, num_layers=2, d_ff=512, num_heads=4), decoder=slm)
model = LLM2SLMForConditionalGeneration(config).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(2, 1000, (16, 64))

def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def step():
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

base, peak, done = rss(), 0, False

def sample():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.0005)

threading.Thread(target=sample, daemon=True).start()
step()
step()
done = True
memory = training_memory(config, TrainingSetup(batch_size=16, prompt_length=64, output_length=64))
print((peak - base) / (memory["total"] - sum(p.nbytes for p in model.parameters())))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_count_is_close_to_the_memory_of_a_process() -> None:
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=200)
    assert float(result.stdout.splitlines()[-1]) == pytest.approx(1, abs=0.15)
