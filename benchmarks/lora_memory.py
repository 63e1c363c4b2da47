"""
Compare the peak memory of training with LoRA, without that of the imports, with the estimate.

    python benchmarks/lora_memory.py --output docs/results/lora-memory.json

One process writes a checkpoint with the sizes of a preset, random weights and the LLM in bfloat16; another one trains
it: batch size 8, prompts and targets of 64 tokens, gradient checkpointing, three steps of AdamW. Memory is read every
millisecond. Frozen weights stay mapped from the file and are not anonymous memory; `peak_resident` includes them.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


FIELDS = ("RssAnon", "VmRSS")


def memory() -> list[int]:
    """Return the anonymous and the resident memory of this process, the latter with mapped files, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(FIELDS)}
    return [int(values[field]) * 1024 for field in FIELDS]


def train(folder: str, batch: int, prompt: int, target: int) -> dict[str, Any]:
    """Load and train in this process; return the memory in bytes."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    from modeling_llm2slm import lora_config
    from modeling_llm2slm.training.memory import TrainingSetup, training_memory

    torch.set_num_threads(1)
    baselines, peaks, done = memory(), [0, 0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            peaks[:] = map(max, peaks, memory())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
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
    done.set()
    sampler.join()
    setup = TrainingSetup(
        batch_size=batch, prompt_length=prompt, output_length=target, lora={}, gradient_checkpointing=True
    )
    counted = training_memory(base.config, setup)
    anonymous, every = (peak - baseline for peak, baseline in zip(peaks, baselines, strict=True))
    return {
        "llm_bytes": llm,
        "peak_anonymous": anonymous,
        "peak_resident": every,
        "peak_resident_above_llm": every - llm,
        "counted": counted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="t5-large_gpt2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(train(args.folder, args.batch, args.prompt, args.target)))
        return
    from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

    config = LLM2SLMConfig.from_pretrained(Path(__file__).parent.parent / "configuration" / f"{args.preset}.json")
    with tempfile.TemporaryDirectory() as folder:
        LLM2SLMForConditionalGeneration(config).save_pretrained(folder)
        sizes = ["--batch", str(args.batch), "--prompt", str(args.prompt), "--target", str(args.target)]
        command = [sys.executable, __file__, "--folder", folder, *sizes]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes_of = {"batch": args.batch, "prompt": args.prompt, "target": args.target}
    report = {"preset": args.preset, **sizes_of, **json.loads(output.splitlines()[-1])}
    print(json.dumps(report, indent=2))
    if args.output:
        from modeling_llm2slm.data.records import write_json

        write_json(args.output, report)


if __name__ == "__main__":
    main()
