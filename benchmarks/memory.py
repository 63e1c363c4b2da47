"""
Memory of a process that loads a model, of one that trains with LoRA, and the estimates for training each preset.

    python -m benchmarks.memory load --output docs/results/load-memory.json
    python -m benchmarks.memory lora --output docs/results/lora-memory.json
    python -m benchmarks.memory estimates --output docs/results/training-memory.json

`load` and `lora` write a checkpoint with the sizes of a preset and random weights to a temporary folder (about 1.9 GB
for t5-large_gpt2). Another process loads it, or trains it with gradient checkpointing for three steps of AdamW. Memory
is read every millisecond, and the memory of the imports is subtracted. Frozen weights stay mapped from the file and
are not anonymous memory; `peak_resident` includes them. Linux only.

`estimates` counts the training memory of each preset (`modeling_llm2slm.training.memory`) for batches of 32, prompts
of 256 tokens and targets of 128, bfloat16 autocast and AdamW, as in the recipes one_node.yaml and several_nodes.yaml.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


LOADS: dict[str, dict[str, str]] = {
    "as saved (float32)": {},
    "dtype=bfloat16": {"dtype": "bfloat16"},
    "encoder_dtype=bfloat16": {"encoder_dtype": "bfloat16"},
}
LORA = {"batch": 8, "prompt": 64, "target": 64}
PRESETS = ("t5-large_gpt2", "t5-large_t5-small", "flan-t5-xl_gpt2", "t5-3b_gpt2")
SIZES: dict[str, Any] = {"batch_size": 32, "prompt_length": 256, "output_length": 128}
SETTINGS: dict[str, dict[str, Any]] = {
    "LLM running, replicated": {},
    "stored hidden states, replicated": {"llm_states": True},
    "LLM running, sharded over 8": {"shards": 8},
    "LLM running, LoRA": {"lora": {}},
    "stored hidden states, LoRA, gradient checkpointing": {
        "llm_states": True, "lora": {}, "gradient_checkpointing": True,
    },
}  # fmt: skip


def memory() -> dict[str, int]:
    """Return the anonymous and the resident memory of this process, the latter with mapped files, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return {"anonymous": 1024 * int(kilobytes["RssAnon"]), "resident": 1024 * int(kilobytes["VmRSS"])}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Measure the peak memory of the block, less that before it; `with imports` includes that."""
    result: dict[str, int] = {}
    before, peaks, done = memory(), memory(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            peaks.update({name: max(peaks[name], size) for name, size in memory().items()})
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield result
    finally:
        done.set()
        sampler.join()
        for name, peak in peaks.items():
            result |= {name: peak - before[name], f"{name} with imports": peak}


def in_a_process(module: str, function: str, *arguments: Any) -> Any:
    """Call a function of a module in a process of its own, which its `--call` names, and return its result."""
    command = [sys.executable, "-m", module, "--call", json.dumps([function, *arguments])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def load(folder: str, kwargs: dict[str, str]) -> dict[str, Any]:
    """Load the checkpoint in this process; return the peak memory and the weights, in bytes."""
    from transformers import AutoModelForSeq2SeqLM

    import modeling_llm2slm  # noqa: F401 - registers the model

    with peak_memory() as peak:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **kwargs)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"weights": weights, "peak": peak["anonymous"], "ratio": peak["anonymous"] / weights}


def train(folder: str, batch: int, prompt: int, target: int) -> dict[str, Any]:
    """Load and train in this process; return the memory in bytes."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    from modeling_llm2slm import lora_config
    from modeling_llm2slm.training.memory import TrainingSetup, training_memory

    torch.set_num_threads(1)
    with peak_memory() as peak:
        base = AutoModelForSeq2SeqLM.from_pretrained(folder)
        llm = sum(parameter.nbytes for parameter in base.encoder.llm.parameters())
        model = get_peft_model(base, lora_config(base)).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        ids = torch.randint(2, base.config.encoder.vocab_size, (batch, prompt))
        labels = torch.randint(2, base.config.vocab_size, (batch, target))
        for _ in range(3):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    setup = TrainingSetup(
        batch_size=batch, prompt_length=prompt, output_length=target, lora={}, gradient_checkpointing=True
    )
    return {
        "llm_bytes": llm,
        "peak_anonymous": peak["anonymous"],
        "peak_resident": peak["resident"],
        "peak_resident_above_llm": peak["resident"] - llm,
        "counted": training_memory(base.config, setup),
    }


def measure_load(preset: str) -> dict[str, Any]:
    """Return the memory of loading a checkpoint in each way."""
    with random_checkpoint(preset, encoder_dtype=None) as folder:
        loads = {name: in_a_process("benchmarks.memory", "load", folder, kwargs) for name, kwargs in LOADS.items()}
    return {"preset": preset, **loads}


def measure_lora(preset: str) -> dict[str, Any]:
    """Return the memory of training with LoRA, and the estimate."""
    with random_checkpoint(preset) as folder:
        return {"preset": preset, **LORA, **in_a_process("benchmarks.memory", "train", folder, *LORA.values())}


def estimate() -> dict[str, Any]:
    """Return the estimated training memory of each of `PRESETS`."""
    from modeling_llm2slm.conversion.build import preset_config
    from modeling_llm2slm.training.memory import TrainingSetup, training_memory

    rows = {
        preset: {
            name: training_memory(preset_config(preset), TrainingSetup(bf16=True, **SIZES, **setting))
            for name, setting in SETTINGS.items()
        }
        for preset in PRESETS
    }
    return {**SIZES, "bytes": rows}


@contextmanager
def random_checkpoint(preset: str, **changes: Any) -> Iterator[str]:
    """Write a checkpoint with the sizes of a preset and random weights to a temporary folder."""
    from modeling_llm2slm import LLM2SLMForConditionalGeneration
    from modeling_llm2slm.conversion.build import preset_config

    config = preset_config(preset)
    for name, value in changes.items():
        setattr(config, name, value)
    with tempfile.TemporaryDirectory() as folder:
        LLM2SLMForConditionalGeneration(config).save_pretrained(folder)
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("load", "lora", "estimates"), default="load")
    parser.add_argument("--preset", default="t5-large_gpt2", help="for load and lora")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        function, *arguments = json.loads(args.call)
        print(json.dumps(load(*arguments) if function == "load" else train(*arguments)))
        return
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "load": lambda: measure_load(args.preset), "lora": lambda: measure_lora(args.preset), "estimates": estimate,
    }  # fmt: skip
    report = measures[args.what]()
    print(json.dumps(report, indent=2))
    if args.output:
        from modeling_llm2slm.data.records import write_json

        write_json(args.output, report)


if __name__ == "__main__":
    main()
