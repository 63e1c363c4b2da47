"""
Per-token decode of an LLM-to-SLM model against its bare SLM: same `generate()`, same cache length, alternating runs.

    python benchmarks/decode_overhead.py --output docs/results/decode-overhead.json

Sizes are those of a preset, weights are random, one thread by default. Both decode greedily from a prompt of
`--prompt` positions; a step's time is taken between the stopping criteria of two tokens, a run's is the median of its
steps, and the ratio is the median over `--runs` pairs of runs.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration


class StepClock(StoppingCriteria):
    """Notes the time at which each token is done, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def step_ms(model: Any, new_tokens: int, **inputs: Any) -> float:
    """Median time of a decode step after the first, in ms."""
    clock = StepClock()
    model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=StoppingCriteriaList([clock])
    )
    steps = [(after - before) * 1000 for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return statistics.median(steps)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate composite and bare SLM, and return both medians and the median ratio."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LLM2SLMConfig.from_pretrained(Path(__file__).parent.parent / "configuration" / f"{args.preset}.json")
    model = LLM2SLMForConditionalGeneration(config).eval()
    slm = model.decoder
    for part in (model, slm):
        part.generation_config.eos_token_id = None  # every run writes the same number of tokens
        part.generation_config.pad_token_id = config.pad_token_id
    prompt_ids = torch.randint(2, config.encoder.vocab_size, (args.batch, args.prompt))
    prompt = model.encode_prompt(prompt_ids)
    # The composite caches prompt and start token: as many positions as the bare SLM reads here.
    slm_ids = torch.randint(2, config.vocab_size, (args.batch, args.prompt + 1))
    composite: list[float] = []
    bare: list[float] = []
    for run in range(args.runs + 1):
        order = [(composite, model, {"encoder_outputs": prompt}), (bare, slm, {"input_ids": slm_ids})]
        for times, part, inputs in order if run % 2 else order[::-1]:
            times.append(step_ms(part, args.answer, **inputs))
    composite, bare = composite[1:], bare[1:]  # the first pair warms up
    ratios = [a / b for a, b in zip(composite, bare, strict=True)]
    return {
        "preset": args.preset,
        "prompt": args.prompt,
        "answer": args.answer,
        "batch": args.batch,
        "threads": args.threads,
        "runs": args.runs,
        "composite_ms_per_token": statistics.median(composite),
        "bare_slm_ms_per_token": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="t5-large_gpt2")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=2)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
