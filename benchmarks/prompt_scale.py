"""
Measure the scale of the prompt embeddings relative to the SLM's embeddings at the start of training.

    python benchmarks/prompt_scale.py --output docs/results/prompt-scale.json

The last norm of the LLMs scales their hidden states from 0.05 to 20. The embeddings of the SLMs have a root mean
square of 0.02 (GPT-2's initialization) or 0.14 (its released weights). Weights are random. "ratio_default" is the
ratio with the default initialization of transformers (normal, 0.02).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.data.records import write_json


T5 = {"vocab_size": 1000, "d_model": 512, "d_ff": 1024, "num_layers": 4, "num_heads": 8}
GPT2 = {"vocab_size": 1000, "n_embd": 256, "n_layer": 4, "n_head": 8, "bos_token_id": 0, "eos_token_id": 0}


def scale(fusion: str, states_rms: float, embedding_rms: float) -> dict[str, Any]:
    """Return the ratio of the scales for one LLM and one SLM."""
    torch.manual_seed(0)
    llm, slm = T5EncoderModel(T5Config(**T5)), GPT2LMHeadModel(GPT2Config(**GPT2))
    nn.init.constant_(llm.encoder.final_layer_norm.weight, states_rms)
    nn.init.normal_(slm.transformer.wte.weight, std=embedding_rms)
    with tempfile.TemporaryDirectory() as folder:
        llm.save_pretrained(f"{folder}/llm")
        slm.save_pretrained(f"{folder}/slm")
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
            f"{folder}/llm", f"{folder}/slm", fusion=fusion, shared_tokenizer=False
        )
    prompts = torch.randint(3, 1000, (8, 32))

    def ratio() -> float:
        table: Any = model.get_input_embeddings().weight
        prompt = model.encode_prompt(prompts).last_hidden_state
        return float((prompt.square().mean() / table.detach().square().mean()).sqrt())

    ours = ratio()
    for trained in model.encoder.new_modules().values():
        for module in trained.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    return {
        "fusion": fusion,
        "llm_states_rms": states_rms,
        "slm_embedding_rms": embedding_rms,
        "ratio": round(ours, 3),
        "ratio_default": round(ratio(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [
        scale(fusion, states_rms, embedding_rms)
        for fusion in ("add", "replace")
        for states_rms in (0.05, 1.0, 20.0)
        for embedding_rms in (0.02, 0.14)
    ]
    print(json.dumps(rows, indent=2))
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    main()
