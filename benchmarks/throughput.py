"""
Generate for a file of prompts in its own order, and as `llm2slm generate --file --output` does.

    python -m benchmarks.throughput --model runs/multi30k/en-de/t5-add-distilled/model --data /path/to/data

The prompts are the first of Multi30k's training split, English to German; decoding is greedy. In order, 32 prompts
form a batch, sorted by length within 512. Otherwise the whole file is sorted, equal prompts are generated for once,
and batches are limited by tokens, with and without encoding the next batch while one is generated. A second
thread encodes ahead. Seconds are those of generation; processor seconds include loading. All outputs must agree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.data.loading import load_prompts
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.inference.batching import BatchLimits
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import DataSettings, GenerateFileSettings


ROOT = Path(__file__).parents[1]
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Way:
    """How to generate for a file, on how many cores, and how often it is timed."""

    limits: BatchLimits | None
    overlap: bool = False
    cores: int | None = None
    rounds: int = 2


BY_TOKENS = BatchLimits(128, 4096)
WAYS = {
    "in order, batches of 32": Way(None),
    "sorted, batches of 32": Way(BatchLimits(32)),
    "by tokens": Way(BY_TOKENS),
    "by tokens, encoded ahead": Way(BY_TOKENS, overlap=True),
    "by tokens, encoded ahead, one core": Way(BY_TOKENS, overlap=True, cores=1, rounds=1),
}


def in_order(model: str, data: Path, limit: int) -> tuple[float, list[str]]:
    """Return the seconds and outputs of batches in the file's own order."""
    prompts = load_prompts(data, DataSettings(prompt_column="source", limit=limit))["prompt"][:]
    text_to_text = TextToText.from_pretrained(model)
    outputs: list[str] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), 512):
        outputs += text_to_text.generate(prompts[first : first + 512], 32, max_new_tokens=MAX_NEW_TOKENS)
    return time.perf_counter() - start, outputs


def from_file(model: str, data: Path, limit: int, way: Way, output: Path) -> tuple[float, list[str], dict[str, int]]:
    """Return the seconds, outputs and counts of `generate_file`."""
    assert way.limits is not None
    settings = GenerateFileSettings(
        prompt_column="source", limit=limit, batch_size=way.limits.rows, batch_tokens=way.limits.tokens,
        overlap=way.overlap, max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    report = generate_file(model, data, output, settings)
    outputs = output.read_text(encoding="utf-8").splitlines()
    output.unlink()
    return report.seconds, outputs, {"duplicates": report.duplicates, "output_tokens": report.tokens}


def measure(model: str, data: Path, limit: int) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    processor_seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    counts: dict[str, int] = {}
    expected: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(max(way.rounds for way in WAYS.values())):
            for name, way in list(WAYS.items())[:: -1 if turn else 1]:
                if turn >= way.rounds:
                    continue
                os.sched_setaffinity(0, sorted(cores)[: way.cores])
                processor = time.process_time()
                if way.limits is None:
                    taken, outputs = in_order(model, data, limit)
                else:
                    taken, outputs, counts = from_file(model, data, limit, way, Path(folder) / "outputs.txt")
                expected = expected or outputs
                assert outputs == expected, "the outputs differ"
                seconds[name].append(taken)
                processor_seconds[name].append(time.process_time() - processor)
                print(f"{name}: {limit / taken:.1f} prompts/s", flush=True)
    os.sched_setaffinity(0, cores)
    speeds = {name: limit / statistics.median(times) for name, times in seconds.items()}
    return {
        "prompts": limit,
        **counts,
        "prompts_per_second": speeds,
        "times_as_fast": {name: value / speeds["in order, batches of 32"] for name, value in speeds.items()},
        "seconds": seconds,
        "processor_seconds": processor_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--model", default="runs/multi30k/en-de/t5-add-distilled/model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLM2SLM_DATA", "data")))
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "throughput.json")
    parser.add_argument("--note", help="remark that is saved with the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = arguments.data / "multi30k" / "en-de" / "train.jsonl.gz"
    result: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "parameters": TextToText.from_pretrained(arguments.model).parameters(),
    }
    result |= measure(arguments.model, data, arguments.limit)
    result |= {"cores": len(os.sched_getaffinity(0)), "note": arguments.note, "versions": versions()}
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
