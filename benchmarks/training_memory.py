"""
Estimate the training memory of each preset on one device, see `modeling_llm2slm.training.memory`.

    python benchmarks/training_memory.py --output docs/results/training-memory.json

Batches of 32, prompts of 256 tokens and targets of 128, bfloat16 autocast, AdamW, as in the recipes one_node.yaml and
several_nodes.yaml. The tests compare the estimate with the memory of a process.
"""

import argparse
from pathlib import Path
from typing import Any

from modeling_llm2slm.conversion.build import preset_config
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.training.memory import TrainingSetup, training_memory


PRESETS = ("t5-large_gpt2", "t5-large_t5-small", "flan-t5-xl_gpt2", "t5-3b_gpt2")
SIZES: dict[str, Any] = {"batch_size": 32, "prompt_length": 256, "output_length": 128}
SETTINGS: dict[str, dict[str, Any]] = {
    "LLM running, replicated": {},
    "stored hidden states, replicated": {"llm_states": True},
    "LLM running, sharded over 8": {"shards": 8},
    "LLM running, LoRA": {"lora": {}},
    "stored hidden states, LoRA, gradient checkpointing": {
        "llm_states": True,
        "lora": {},
        "gradient_checkpointing": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = {
        preset: {
            name: training_memory(preset_config(preset), TrainingSetup(bf16=True, **SIZES, **setting))
            for name, setting in SETTINGS.items()
        }
        for preset in PRESETS
    }
    for preset, settings in rows.items():
        for name, memory in settings.items():
            parts = ", ".join(f"{part} {count / 1e9:.2f}" for part, count in memory.items())
            print(f"{preset:18} {name:44} GB: {parts}")
    if args.output:
        write_json(args.output, {**SIZES, "bytes": rows})


if __name__ == "__main__":
    main()
