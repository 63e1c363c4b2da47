"""
Time an LLM-to-SLM model against its LLM over lengths of prompts and outputs and batch sizes, in turns, in PyTorch.

    python -m benchmarks.prompt_lengths --llm runs/.../llm/model --model runs/.../cache/model

Prompts are random tokens, as no output is scored; outputs of a cell have the same number of tokens. A ratio below 1
says that the LLM-to-SLM model is faster. The results are in docs/results/prompt-lengths.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.timing import seconds_of, time_in_turns
from modeling_llm2slm.inference.text_to_text import TextToText


OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "prompt-lengths.json"
CELLS = [f"{prompt}/32x{batch}" for prompt in (16, 64, 256, 1024) for batch in (1, 8, 32)] + ["64/256x1", "64/256x32"]


def parse_cell(text: str) -> tuple[int, int, int]:
    """Return the tokens of a prompt and of an output, and the batch size, of a cell such as `64/32x8`."""
    prompt, rest = text.split("/")
    output, batch = rest.split("x")
    return int(prompt), int(output), int(batch)


def measure(models: dict[str, Any], cells: list[tuple[int, int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield, for each cell, the median seconds of each model and the median ratio to `llm`."""
    for length, new_tokens, batch in cells:
        ids = torch.randint(10, models["llm"].config.vocab_size, (batch, length))

        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

        def contestant(model: Any, ids: torch.Tensor = ids, options: Any = options) -> Callable[[int], float]:
            def generate(_: int) -> float:
                with torch.no_grad():
                    return seconds_of(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))

            return generate

        times = time_in_turns({name: contestant(model) for name, model in models.items()}, range(rounds))
        ratios = [own / llm for own, llm in zip(times["llm2slm"], times["llm"], strict=True)]
        seconds = {name: statistics.median(values) for name, values in times.items()}
        ratio = statistics.median(ratios)
        print(f"{length:5} / {new_tokens:3} tokens, batch {batch:2}: {ratio:.2f} of the LLM's time", flush=True)
        sizes = {"prompt_tokens": length, "new_tokens": new_tokens, "batch": batch}
        yield {**sizes, "seconds": seconds, "ratio": ratio}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--llm", required=True, help="folder of the LLM")
    parser.add_argument("--model", required=True, help="folder of the LLM-to-SLM model")
    cells = [parse_cell(cell) for cell in CELLS]
    parser.add_argument(
        "--cells", nargs="+", type=parse_cell, default=cells, help="tokens of prompt and output, batch: 64/32x8"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = {"llm": arguments.llm, "llm2slm": arguments.model}
    models = {name: TextToText.from_pretrained(path, dtype=arguments.dtype).model for name, path in names.items()}
    settings = {key: getattr(arguments, key) for key in ("rounds", "dtype", "threads")}
    result: dict[str, Any] = {"settings": settings, "versions": versions(), "cells": []}
    for cell in measure(models, arguments.cells, arguments.rounds):
        result["cells"].append(cell)
        write_json(arguments.output, result)  # a run that is stopped keeps what it measured


if __name__ == "__main__":
    main()
