"""
Measure `llm2slm serve` under load: latency, time to the first text and tokens per second, with and without batching.

    make demo && python -m benchmarks.serving

Two servers of the same model take turns, one with batches of up to 16 prompts and one without batches. Clients stream
the outputs of the demo's test prompts; each sends its next request when the last one is complete. Each server has one
thread, and the clients run on the same machine. Both servers must give the same outputs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from examples.demo import DATA
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.settings import DataSettings


ROOT = Path(__file__).parents[1]
CONCURRENCY, BATCHES = (1, 4, 16), (16, 1)
MAX_TOKENS = 48


class Completion(NamedTuple):
    """What a client received: the text, its tokens, seconds until the first piece and until the end."""

    text: str
    tokens: int
    first: float
    whole: float


@contextmanager
def server(model: str, max_batch: int) -> Iterator[int]:
    """Start a server in another process; give its port."""
    words = ["serve", model, "--port", "0", "--name", "model", "--max-batch", str(max_batch)]
    process = subprocess.Popen(
        [sys.executable, "-m", "llm2slm", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    try:
        yield int(said.split(":")[2].split(".")[0])
    finally:
        process.terminate()
        assert process.wait(60) == 0


def request(port: int, prompt: str) -> Completion:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    fields = {"prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(fields))
    text, tokens, first = "", 0, 0.0
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            first = first or time.perf_counter() - start
            text += "".join(choice["text"] for choice in event["choices"])
            tokens = event.get("usage", {}).get("completion_tokens", tokens)
    whole = time.perf_counter() - start
    connection.close()
    return Completion(text, tokens, first, whole)


def load(port: int, prompts: list[str], clients: int) -> tuple[float, list[Completion]]:
    """Return the seconds for all prompts, and their completions."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        completions = list(pool.map(lambda prompt: request(port, prompt), prompts))
    return time.perf_counter() - start, completions


def summary(seconds: list[float], completions: list[Completion]) -> dict[str, float]:
    whole, first = (
        sorted(completion.whole for completion in completions),
        sorted(completion.first for completion in completions),
    )
    return {
        "requests": len(completions),
        "latency_ms_p50": 1000 * statistics.median(whole),
        "latency_ms_p95": 1000 * whole[int(0.95 * len(whole))],
        "first_text_ms_p50": 1000 * statistics.median(first),
        "first_text_ms_p95": 1000 * first[int(0.95 * len(first))],
        "tokens_per_second": sum(completion.tokens for completion in completions) / sum(seconds),
        "requests_per_second": len(completions) / sum(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--model", default="runs/demo/llm2slm", help="a checkpoint; default: the one of `make demo`")
    parser.add_argument("--requests", type=int, default=192, help="requests for each number of clients")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "serving.json")
    arguments = parser.parse_args()
    prompts = load_examples(DATA["test"], DataSettings(limit=arguments.requests))["prompt"][:]
    seconds: dict[tuple[int, int], list[float]] = {(batch, n): [] for batch in BATCHES for n in CONCURRENCY}
    completions: dict[tuple[int, int], list[Completion]] = {key: [] for key in seconds}
    with server(arguments.model, BATCHES[0]) as batched, server(arguments.model, BATCHES[1]) as single:
        ports = dict(zip(BATCHES, (batched, single), strict=True))
        for port in ports.values():
            load(port, prompts[:16], 4)
        for half in (prompts[0::2], prompts[1::2]):
            texts: list[str] = []
            for clients in CONCURRENCY:
                for batch, port in ports.items():
                    taken, found = load(port, half, clients)
                    texts = texts or [completion.text for completion in found]
                    assert [completion.text for completion in found] == texts, "the outputs differ"
                    seconds[batch, clients].append(taken)
                    completions[batch, clients] += found
    result: dict[str, Any] = {
        f"up to {batch} at once": {
            f"{clients} clients": summary(seconds[batch, clients], completions[batch, clients])
            for clients in CONCURRENCY
        }
        for batch in BATCHES
    }
    result["tokens_per_second_by_batching"] = {
        f"{clients} clients": sum(seconds[1, clients]) / sum(seconds[16, clients]) for clients in CONCURRENCY
    }
    tokens = [completion.tokens for completion in completions[1, 1]]
    result |= {"tokens_per_output": statistics.mean(tokens), "cores": os.cpu_count(), "versions": versions()}
    write_json(arguments.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
