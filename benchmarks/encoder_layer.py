"""
Measure what `encoder_layer` saves for a decoder-only LLM: parameters, time to load, time to encode 64 tokens.

    python benchmarks/encoder_layer.py

A Llama with 16 layers and random weights, one thread, medians of five rounds in turns. `None` uses all layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_llm2slm import LLM2SLMForConditionalGeneration as Model
from modeling_llm2slm.data.records import versions, write_json


OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "encoder-layer.json"
LAYERS = (4, 8, 12, None)
LLM = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
ROUNDS = 5


def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Return the result of a call, and the milliseconds that it took."""
    start = time.perf_counter()
    result = call(*args, **kwargs)
    return result, 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompt = torch.randint(3, 32000, (1, 64))
    rows: dict[Any, dict[str, list[float]]] = {layer: {"load": [], "read": []} for layer in LAYERS}
    parameters = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**LLM)).to(torch.bfloat16).save_pretrained(folder)
        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 1000}
        slm = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        for _ in range(ROUNDS):
            for layer in LAYERS:
                options = {"decoder_model": slm, "encoder_layer": layer, "encoder_dtype": "float32"}
                model, loading = timed(Model.from_encoder_decoder_pretrained, folder, **options)
                parameters[layer] = model.encoder.llm.num_parameters()
                model.encode_llm(prompt)
                rows[layer]["load"].append(loading)
                rows[layer]["read"].append(timed(model.encode_llm, prompt)[1])
    result = {
        "llm": LLM,
        "rows": [
            {
                "encoder_layer": layer,
                "parameters": parameters[layer],
                "load_ms": round(statistics.median(rows[layer]["load"]), 1),
                "read_64_tokens_ms": round(statistics.median(rows[layer]["read"]), 1),
            }
            for layer in LAYERS
        ],
        "versions": versions(),
    }
    write_json(arguments.output, result)
    print(json.dumps(result["rows"], indent=2))


if __name__ == "__main__":
    main()
