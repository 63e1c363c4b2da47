"""
Compare training on stored hidden states with training with the LLM running: time per step, and its bound.

    python benchmarks/encoded_training.py --output docs/results/encoded-training.json

Random weights with the sizes of a preset, float32, one thread by default. A step is forward, backward and AdamW, and
with stored hidden states also reading them from disk. Both kinds of step alternate. The ratio is the median over
rounds, for wall-clock time and for processor time, which other work on a shared machine disturbs less. The bound is
1 + encoder FLOPs / other FLOPs, counted by torch; the optimizer counts as zero.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.configuration_llm2slm import llm_sizes
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.states.description import StoreDescription
from modeling_llm2slm.states.store import StateStore
from modeling_llm2slm.states.writer import StateWriter


def flops(work: Any) -> int:
    """Return the floating-point operations of a call, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def write_store(folder: str, model: Any, prompts: torch.Tensor) -> StateStore:
    """Write a store with the LLM's hidden states of some prompts."""
    tokens, width = prompts.numel(), llm_sizes(model.config.encoder).hidden_size
    description = StoreDescription("", None, "", "", len(prompts), tokens, width)
    writer = StateWriter(folder, description)
    for ids, states in zip(prompts.tolist(), model.encode_llm(prompts, torch.ones_like(prompts)), strict=True):
        writer.add(ids, states)
    writer.flush()
    return StateStore(folder)


def measure(args: argparse.Namespace, prompt: int, target: int) -> dict[str, Any]:
    """Alternate the two kinds of step for one length of prompt and target."""
    torch.manual_seed(0)
    config = LLM2SLMConfig.from_pretrained(Path(__file__).parent.parent / "configuration" / f"{args.preset}.json")
    config.encoder_dtype = None
    model = LLM2SLMForConditionalGeneration(config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)  # the default of Trainer
    prompts = torch.randint(2, config.encoder.vocab_size, (args.batch, prompt))
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    labels = torch.randint(2, config.vocab_size, (args.batch, target))
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(folder, model, prompts)

        def step(stored: bool) -> None:
            states = {"llm_hidden_states": store.batch(**batch)} if stored else {}
            model(**batch, **states, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        counted = {stored: flops(lambda stored=stored: step(stored)) for stored in (False, True)}  # also the warm-up
        for number in range(args.rounds):
            for stored in (False, True) if number % 2 else (True, False):
                clock, processor = time.perf_counter(), time.process_time()
                step(stored)
                times[stored].append((time.perf_counter() - clock, time.process_time() - processor))
    limit = counted[False] / counted[True]
    measured: dict[str, Any] = {}
    for column, name in enumerate(("clock", "processor")):
        seconds = {kind: [row[column] for row in rows] for kind, rows in times.items()}
        ratios = [running / stored for running, stored in zip(seconds[False], seconds[True], strict=True)]
        measured[name] = {
            "ratio": statistics.median(ratios),
            "of_the_limit": statistics.median(ratios) / limit,
            "ratios": ratios,
            "seconds_a_step": {
                "running": statistics.median(seconds[False]),
                "stored": statistics.median(seconds[True]),
            },
        }
    return {
        "prompt": prompt,
        "target": target,
        "encoder_flops": counted[False] - counted[True],
        "other_flops": counted[True],
        "limit": limit,
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="t5-large_gpt2")
    parser.add_argument("--lengths", nargs="+", default=["64/64"], help="tokens of prompt and target")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {
        "preset": args.preset,
        "batch": args.batch,
        "threads": args.threads,
        "rounds": args.rounds,
        "rows": [measure(args, *map(int, lengths.split("/"))) for lengths in args.lengths],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(report, indent=2))
    if args.output:
        write_json(args.output, report)


if __name__ == "__main__":
    main()
