"""
Time an LLM-to-SLM model against its LLM over prompt lengths and batch sizes, in turns, in PyTorch.

    python -m benchmarks.prompt_lengths --llm runs/.../llm/model --model runs/.../cache/model

Prompts are random tokens, as no output is scored; each output has the same number of tokens. A ratio below 1 says that
the LLM-to-SLM model is faster. The results are in docs/results/prompt-lengths.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.timing import seconds_of, time_in_turns
from modeling_llm2slm.inference.text_to_text import TextToText


OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "prompt-lengths.json"


def measure(
    models: dict[str, Any], lengths: list[int], batches: list[int], new_tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield, for each length and batch size, the median seconds of each model and the median ratio to `llm`."""
    for length, batch in itertools.product(lengths, batches):
        ids = torch.randint(10, models["llm"].config.vocab_size, (batch, length))

        def contestant(model: Any, ids: torch.Tensor = ids) -> Callable[[int], float]:
            def generate(_: int) -> float:
                options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
                with torch.no_grad():
                    return seconds_of(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))

            return generate

        times = time_in_turns({name: contestant(model) for name, model in models.items()}, range(rounds))
        ratios = [own / llm for own, llm in zip(times["llm2slm"], times["llm"], strict=True)]
        seconds = {name: statistics.median(values) for name, values in times.items()}
        cell = {"prompt_tokens": length, "batch": batch, "seconds": seconds, "ratio": statistics.median(ratios)}
        print(f"{length:5} tokens, batch {batch:2}: {cell['ratio']:.2f} of the LLM's time", flush=True)
        yield cell


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--llm", required=True, help="folder of the LLM")
    parser.add_argument("--model", required=True, help="folder of the LLM-to-SLM model")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 64, 256, 1024], help="tokens of a prompt")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="prompts in a batch")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an output")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = {"llm": arguments.llm, "llm2slm": arguments.model}
    models = {name: TextToText.from_pretrained(path, dtype=arguments.dtype).model for name, path in names.items()}
    settings = {key: getattr(arguments, key) for key in ("new_tokens", "rounds", "dtype", "threads")}
    result: dict[str, Any] = {"settings": settings, "versions": versions(), "cells": []}
    for cell in measure(models, arguments.lengths, arguments.batches, arguments.new_tokens, arguments.rounds):
        result["cells"].append(cell)
        write_json(arguments.output, result)  # a run that is stopped keeps what it measured


if __name__ == "__main__":
    main()
