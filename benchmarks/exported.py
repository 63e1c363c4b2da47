"""
What `llm2slm export` gains: one prompt and its answer by exported models, against PyTorch and the memory's bandwidth.

    python -m benchmarks.exported --runs runs/exported --output docs/results/exported.json

Sizes are those of a preset, weights are random, one thread by default. All decode greedily from `--prompt` tokens, and
always `--answer` of them; models take turns. A prompt's time is that of `encode_prompt`, a token's that between the
stopping criteria of two tokens (the median of an answer's), and the whole is one `generate()`. Each figure is the
median over `--rounds`. The floor of a token is the time in which the SLM's weights are read once, at the bandwidth of
summing a buffer as large as they are in float32, measured in each round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList, T5Config, T5ForConditionalGeneration

from benchmarks.decode_overhead import StepClock
from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion import export
from modeling_llm2slm.exported import ExportedLLM2SLM


BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}


def answer(model: Any, prompt: torch.Tensor, tokens: int) -> dict[str, float]:
    """Seconds of a prompt, the median token and the whole answer."""
    clock, start = StepClock(), time.perf_counter()
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    whole = time.perf_counter() - start
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    result = {"first_token_ms": 1000 * (clock.times[0] - start), "token_ms": 1000 * statistics.median(steps)}
    if hasattr(model, "encode_prompt"):
        start = time.perf_counter()
        model.encode_prompt(prompt)
        result["prompt_ms"] = 1000 * (time.perf_counter() - start)
    return {**result, "answer_s": whole}


def bandwidth(parameters: int) -> float:
    """Bytes per second of reading a buffer of so many float32 numbers."""
    buffer, times = torch.ones(parameters), []
    for _ in range(3):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


def exported_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """The exported models of a preset by name, written where they are not there yet."""
    torch.manual_seed(0)
    preset = Path(__file__).parent.parent / "configuration" / f"{arguments.preset}.json"
    folder = arguments.runs / arguments.preset
    if not folder.is_dir():
        config = LLM2SLMConfig.from_pretrained(preset, encoder_dtype="float32")
        LLM2SLMForConditionalGeneration(config).save_pretrained(folder)
    models = {}
    for name in arguments.exports:
        runtime, weights = name.split("-")
        place = arguments.runs / f"{arguments.preset}-{name}"
        if not place.is_dir():
            export(folder, place, runtime=runtime, weights=weights)
        models[name] = ExportedLLM2SLM.from_pretrained(place)
    return models


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, models taking turns."""
    torch.set_num_threads(arguments.threads)
    models = exported_models(arguments)
    config = next(iter(models.values())).config
    if "llm" in arguments.pytorch:
        # Its config here is that of a reader alone.
        whole = {**config.encoder.to_dict(), "is_encoder_decoder": True, "use_cache": True}
        models["llm"] = T5ForConditionalGeneration(T5Config.from_dict(whole)).eval()
    if "llm2slm" in arguments.pytorch:
        models["llm2slm"] = LLM2SLMForConditionalGeneration.from_pretrained(arguments.runs / arguments.preset).eval()
    for model in models.values():
        model.generation_config.eos_token_id = None  # all write the same number of tokens
        model.generation_config.pad_token_id = config.pad_token_id
    decode = next(iter(models.values())).details["decode"]
    prompt = torch.randint(2, config.encoder.vocab_size, (1, arguments.prompt))
    rounds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    speeds = []
    for turn in range(arguments.rounds + 1):
        speeds.append(bandwidth(decode))
        for name, model in models.items():
            for what, value in answer(model, prompt, arguments.answer).items():
                if turn:  # the first warms up
                    rounds[name][what].append(value)
    rows = {name: {what: statistics.median(values) for what, values in row.items()} for name, row in rounds.items()}
    speed = statistics.median(speeds)
    return {
        "preset": arguments.preset,
        "prompt": arguments.prompt,
        "answer": arguments.answer,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "bandwidth_gb_s": speed / 1e9,
        "floor_token_ms": {name: 1000 * decode * size / speed for name, size in BYTES.items()},
        "models": rows,
        "all_rounds": {name: dict(row) for name, row in rounds.items()},
        "versions": {name: version(name) for name in ("openvino", "torch", "transformers")},
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="t5-large_gpt2")
    parser.add_argument("--runs", type=Path, default=Path("runs/exported"))
    parser.add_argument(
        "--exports", nargs="*", default=["openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int4"]
    )
    parser.add_argument("--pytorch", nargs="*", default=["llm", "llm2slm"], choices=["llm", "llm2slm"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
