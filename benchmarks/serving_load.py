"""
Load and stress `llm2slm serve`, with the built-in engine and, where it can be imported, with vLLM.

    python -m benchmarks.serving_load            # at most ten minutes on two cores
    python -m benchmarks.serving_load --tiny     # a minute: does the script work?

The models have random weights: GPT-2 behind the encoder of T5-base, and the sizes of the demonstration. The server is
a process of its own; this process is its clients, which use OpenAI's client.

- load: each client sends its next request when the last one is complete, for some seconds. Latency is that of a whole
  request, from first byte to last; tokens per second are those of all clients.
- burst: many requests at once. Each is completed within the time limit, or refused at once with Retry-After.
- vanish: clients that close their connection before, or while, they get their output; seconds until nothing runs.
- SIGTERM under load: what was accepted is completed, and the process ends.
- memory: resident memory of the server over many requests.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from transformers import GPT2Config, T5Config

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.benchmark.models import tokenizer_of
from modeling_llm2slm.data.records import versions, write_json


ROOT = Path(__file__).parents[1]
VOCABULARY = 1000  # token ids of prompts are below it
DEMONSTRATION = {
    "llm": {"vocab_size": 1000, "d_model": 128, "d_kv": 24, "d_ff": 256, "num_layers": 8, "num_heads": 4},
    "slm": {"vocab_size": 1000, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128},
}
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "GPT-2": {
        "llm": {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        "slm": {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    },
    "demonstration": DEMONSTRATION,
}


@dataclass(frozen=True)
class Plan:
    """How much is measured: seconds of each load, requests of each stress, tokens of prompts and outputs."""

    seconds: float = 12
    clients: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 32
    output_tokens: int = 32
    burst: int = 1000
    vanishing: int = 200
    shutdown: int = 100
    requests: int = 5000
    longest_memory: float = 75
    timeout: int = 120


TINY = Plan(
    seconds=2, clients=(1, 4), output_tokens=4, burst=100, vanishing=12, shutdown=12, requests=60, longest_memory=20
)


def make_model(folder: Path, llm: dict[str, int], slm: dict[str, int]) -> str:
    """Write a model with random weights, whose outputs do not end early."""
    torch.manual_seed(0)
    encoder = T5Config(**llm, decoder_start_token_id=0)
    # Random weights repeat the start token, so another one must end an output.
    decoder = GPT2Config(**slm, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=encoder, decoder=decoder, fusion="replace"))
    model.save_pretrained(folder)
    LLM2SLMProcessor(tokenizer_of(encoder), tokenizer_of(decoder)).save_pretrained(folder)
    return str(folder)


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[Any]
    port: int
    plan: Plan

    def client(self) -> openai.AsyncOpenAI:
        """Return OpenAI's client, which opens up to 1,000 connections. It does not try again."""
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=self.plan.timeout + 30)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return response.read().decode()

    def is_idle(self) -> bool:
        health = json.loads(self.get("/health"))
        return health["queue"] == health["running"] == 0

    def memory(self) -> float:
        """Resident memory of the process and its children, in MB."""
        process = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20


@contextmanager
def serving(model: str, engine: str, plan: Plan, **options: int) -> Iterator[Server]:
    """Start a server in another process."""
    options = {"max_batch": 64, "max_queue": 256, "timeout": plan.timeout} | options
    words = ["--engine", engine, "--port", "0", "--name", "model"]
    words += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm2slm", "serve", model, *words],
            cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        try:
            while True:
                said.seek(0)
                text = said.read()
                if found := re.search(r"served at http://[\d.]+:(\d+)", text):
                    break
                assert process.poll() is None, text
                time.sleep(0.2)
            yield Server(process, int(found[1]), plan)
        finally:
            process.terminate()
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


def prompts(plan: Plan, seed: int) -> Iterator[list[int]]:
    """Yield prompts as token ids, all different."""
    generator = random.Random(seed)
    while True:
        yield [generator.randrange(3, VOCABULARY) for _ in range(plan.prompt_tokens)]


@dataclass
class Outcome:
    """What a client got: seconds from first byte to last, output tokens, status (0: no response), Retry-After."""

    seconds: float
    tokens: int = 0
    status: int = 200
    retry_after: str | None = None


async def ask(client: openai.AsyncOpenAI, prompt: list[int], tokens: int) -> Outcome:
    start = time.perf_counter()
    try:
        found = await client.completions.create(model="model", prompt=prompt, max_tokens=tokens)
    except openai.APIStatusError as error:
        return Outcome(time.perf_counter() - start, 0, error.status_code, error.response.headers.get("Retry-After"))
    except openai.APIConnectionError:
        return Outcome(time.perf_counter() - start, 0, 0)
    assert found.usage is not None
    return Outcome(time.perf_counter() - start, found.usage.completion_tokens)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def load(server: Server, plan: Plan, clients: int) -> dict[str, float]:
    """Return latencies and tokens per second of some clients."""
    outcomes: list[Outcome] = []
    source = prompts(plan, clients)
    async with server.client() as client:
        await asyncio.gather(*(ask(client, next(source), 2) for _ in range(clients)))  # warm
        start = time.perf_counter()

        async def one() -> None:
            while time.perf_counter() - start < plan.seconds:
                outcomes.append(await ask(client, next(source), plan.output_tokens))

        await asyncio.gather(*(one() for _ in range(clients)))
        passed = time.perf_counter() - start
    seconds = [outcome.seconds for outcome in outcomes if outcome.status == 200]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(seconds),
        "latency_ms_p50": 1000 * statistics.median(seconds),
        "latency_ms_p95": 1000 * percentile(seconds, 0.95),
        "tokens_per_second": sum(outcome.tokens for outcome in outcomes) / passed,
    }


async def burst(server: Server, plan: Plan) -> dict[str, Any]:
    """Send many requests at once."""
    source = prompts(plan, 1)
    async with server.client() as client:
        await ask(client, next(source), plan.output_tokens)
        outcomes = await asyncio.gather(*(ask(client, next(source), plan.output_tokens) for _ in range(plan.burst)))
        after = await ask(client, next(source), plan.output_tokens)
    completed = [outcome.seconds for outcome in outcomes if outcome.status == 200]
    refused = [outcome for outcome in outcomes if outcome.status in (429, 503)]
    waits = [outcome.seconds for outcome in refused]
    return {
        "requests": plan.burst,
        "completed": len(completed),
        "refused": len(refused),
        "refused_with_retry_after": sum(outcome.retry_after is not None for outcome in refused),
        "neither": plan.burst - len(completed) - len(refused),
        "statuses_of_neither": sorted({each.status for each in outcomes} - {200, 429, 503}),
        "time_limit_s": plan.timeout,
        "slowest_completion_s": max(completed, default=0.0),
        "refusal_s_p50": statistics.median(waits) if waits else 0.0,
        "refusal_s_max": max(waits, default=0.0),
        "request_after_it_s": after.seconds,
        "request_after_it_status": after.status,
    }


async def vanish(server: Server, plan: Plan) -> dict[str, Any]:
    """Let clients close their connections, half of them before the first piece of their output."""
    tokens = 2 * plan.output_tokens
    source = prompts(plan, 2)

    async def one(client: openai.AsyncOpenAI, early: bool) -> None:
        with suppress(openai.APIError, TimeoutError):
            if early:
                await asyncio.wait_for(ask(client, next(source), tokens), 0.05)
                return
            stream = await client.completions.create(
                model="model", prompt=next(source), max_tokens=tokens, stream=True
            )
            async for _ in stream:
                break
            await stream.close()

    before = _counter(server, "llm2slm_tokens_total")
    async with server.client() as client:
        await asyncio.gather(*(one(client, number % 2 == 0) for number in range(plan.vanishing)))
    start = time.perf_counter()
    while not server.is_idle():
        assert time.perf_counter() - start < plan.timeout, "the slots are not free"
        await asyncio.sleep(0.02)
    return {
        "clients": plan.vanishing,
        "seconds_until_idle": time.perf_counter() - start,
        "tokens_asked_for": plan.vanishing * tokens,
        "tokens_generated": _counter(server, "llm2slm_tokens_total") - before,
    }


def _counter(server: Server, name: str) -> int:
    found = re.search(rf"^{name} (\S+)$", server.get("/metrics"), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def memory(server: Server, plan: Plan) -> dict[str, Any]:
    """Send many requests from 32 clients, and note the memory at each tenth of them."""
    source, left, marks = prompts(plan, 3), iter(range(plan.requests)), []
    start = time.perf_counter()
    async with server.client() as client:

        async def one() -> None:
            for number in left:
                if time.perf_counter() - start > plan.longest_memory:
                    return
                outcome = await ask(client, next(source), 4)
                assert outcome.status == 200, outcome
                if (number + 1) % max(plan.requests // 10, 1) == 0:
                    marks.append((number + 1, server.memory()))

        await asyncio.gather(*(one() for _ in range(32)))
    after_two_tenths = marks[1:] or marks
    return {
        "requests": marks[-1][0] if marks else 0,
        "memory_mb": [round(size, 1) for _, size in marks],
        "growth_mb_after_the_first_fifth": round(after_two_tenths[-1][1] - after_two_tenths[0][1], 1)
        if marks
        else None,
    }


async def shutdown(server: Server, plan: Plan) -> dict[str, Any]:
    """Send SIGTERM while outputs are generated."""
    source = prompts(plan, 4)
    async with server.client() as client:
        sent = [
            client.completions.create(model="model", prompt=next(source), max_tokens=plan.output_tokens, stream=True)
            for _ in range(plan.shutdown)
        ]
        streams = await asyncio.gather(*sent, return_exceptions=True)
        accepted: list[Any] = [stream for stream in streams if not isinstance(stream, BaseException)]
        unfinished = json.loads(server.get("/health"))
        server.process.send_signal(signal.SIGTERM)
        start = time.perf_counter()

        async def complete(stream: Any) -> bool:
            reason = None
            with suppress(openai.APIError):
                async for event in stream:
                    reason = event.choices[0].finish_reason or reason
            return reason is not None

        complete_ones = sum(await asyncio.gather(*map(complete, accepted)))
    code = server.process.wait(120)
    return {
        "accepted": len(accepted),
        "unfinished_at_sigterm": unfinished["queue"] + unfinished["running"],
        "completed": complete_ones,
        "exit_code": code,
        "seconds_until_exit": time.perf_counter() - start,
    }


def measure(model: str, engine: str, plan: Plan, with_stress: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    loads: dict[str, Any] = {}
    stress: dict[str, Any] = {}
    with serving(model, engine, plan) as server:
        for clients in plan.clients:
            loads[f"{clients} clients"] = found = asyncio.run(load(server, plan, clients))
            words = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
            print(f"  {engine}, {clients} clients: {words}", flush=True)
        if with_stress:
            for test in (burst, vanish, memory, shutdown):
                stress[test.__name__] = found = asyncio.run(test(server, plan))
                print(f"  {engine}, {test.__name__}: {found}", flush=True)
    return loads, stress


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the demonstration's sizes only, for seconds only")
    parser.add_argument("--engine", action="append", help="default: pytorch, and vllm if it can be imported")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "serving-load.json")
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else Plan()
    engines = arguments.engine or ["pytorch", *(["vllm"] if find_spec("vllm") else [])]
    sizes = {"demonstration": DEMONSTRATION} if arguments.tiny else SIZES
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    start = time.perf_counter()
    result: dict[str, Any] = {"load": {}, "stress": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # where the engine of vLLM writes the SLM
        for name, parts in sizes.items():
            model = make_model(Path(folder) / name, **parts)
            print(name, flush=True)
            loads = {}
            for engine in engines:
                loads[engine], stress = measure(model, engine, plan, parts is DEMONSTRATION)
                if stress:
                    result["stress"][engine] = stress
            result["load"][name] = loads
            if len(engines) == 2:
                first, second = engines
                result["load"][name][f"tokens_per_second_of_{second}_by_{first}"] = {
                    level: loads[second][level]["tokens_per_second"] / loads[first][level]["tokens_per_second"]
                    for level in loads[first]
                }
    if "vllm" in engines:
        names = importlib.metadata.packages_distributions()["vllm"]
        result["vllm"] = {name: importlib.metadata.version(name) for name in set(names)}
    settings = {name: getattr(plan, name) for name in ("prompt_tokens", "output_tokens", "seconds")}
    result |= {**settings, "cores": len(os.sched_getaffinity(0)), "seconds_of_all": time.perf_counter() - start}
    write_json(arguments.output, result | {"versions": versions()})


if __name__ == "__main__":
    main()
