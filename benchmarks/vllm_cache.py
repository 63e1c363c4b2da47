"""
Measure tokens per second in vLLM: an LLM, and a model with fusion "cache" that was made of it.

    python -m benchmarks.vllm_cache --llm runs/llm --model runs/model   # at most eight minutes on two cores
    python -m benchmarks.vllm_cache                # random weights of the size of Gemma 3 270M with 41,856 tokens
    python -m benchmarks.vllm_cache --tiny         # a minute or two: does the script work?

Each model runs in a process of its own, without a server. Each client has one request at a time and sends the next one
when it is complete; its first output has a random length, so that clients do not march in step. Prompts are random
token ids, all different and the same for both models, and outputs do not end early. Both models are compiled, as is
vLLM's default; `--eager` leaves that out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.benchmark.models import tokenizer_of
from modeling_llm2slm.conversion.cut import cut
from modeling_llm2slm.data.records import versions, write_json


ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 41856, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
}  # fmt: skip
TINY_SIZES = {**SIZES, "vocab_size": 500, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6} | {
    "head_dim": 64
}


@dataclass(frozen=True)
class Plan:
    """What is measured: seconds of each load, tokens of prompts and outputs, and how the models run."""

    seconds: float = 20
    clients: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 64
    output_tokens: int = 32
    dtype: str = "float32"
    eager: bool = False


TINY: dict[str, Any] = {"seconds": 2, "clients": (1, 4), "prompt_tokens": 16, "output_tokens": 8}


def make_models(folder: Path, sizes: dict[str, int]) -> tuple[str, str]:
    """Write an LLM with random weights, and a model whose SLM is made of a third of its layers; return their paths."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    llm = AutoModelForCausalLM.from_config(config)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=llm, decoder_model=cut(llm, config.num_hidden_layers // 3), fusion="cache", shared_tokenizer=True
    )
    tokenizer = tokenizer_of(config)
    for part, processor, name in (
        (llm, tokenizer, "llm"),
        (model, LLM2SLMProcessor(tokenizer, tokenizer), "model"),
    ):
        part.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return str(folder / "llm"), str(folder / "model")


def load(llm: Any, plan: Plan, clients: int, vocab_size: int) -> dict[str, float]:
    """Let clients send requests for some seconds; return the output tokens per second of all, and their requests."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    generator, numbers, engine = random.Random(clients), itertools.count(), llm.llm_engine

    def add(tokens: int) -> None:
        prompt = [generator.randrange(3, vocab_size) for _ in range(plan.prompt_tokens)]
        (rendered,) = llm._preprocess_cmpl([{"prompt_token_ids": prompt}])
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine.add_request(str(next(numbers)), rendered, sampling)

    tokens = requests = 0
    start = time.perf_counter()
    for _ in range(clients):
        add(generator.randint(1, plan.output_tokens))
    while (passed := time.perf_counter() - start) < plan.seconds:
        for output in engine.step():
            tokens += len(output.outputs[0].token_ids)
            if output.finished:
                requests += 1
                add(plan.output_tokens)
    engine.abort_request([str(number) for number in range(next(numbers))])
    while engine.has_unfinished_requests():
        engine.step()
    return {"tokens_per_second": tokens / passed, "requests": requests, "seconds": passed}


def measure(path: str, plan: Plan) -> dict[str, Any]:
    """Load a model in this process, and measure it with each number of clients."""
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(
        path, dtype=plan.dtype, enforce_eager=plan.eager, max_num_seqs=max(plan.clients), disable_log_stats=True,
        max_model_len=2 * (plan.prompt_tokens + plan.output_tokens), generation_config="vllm",
    )  # fmt: skip
    result: dict[str, Any] = {"seconds_to_load": time.perf_counter() - start}
    config = AutoConfig.from_pretrained(path)
    vocab_size = getattr(config, "encoder", config).vocab_size
    load(llm, Plan(seconds=1, prompt_tokens=plan.prompt_tokens, output_tokens=4), 2, vocab_size)  # warm
    for clients in plan.clients:
        result[f"{clients} clients"] = load(llm, plan, clients, vocab_size)
    return result


def in_process(path: str, plan: Plan) -> dict[str, Any]:
    """Do the same in a process of its own."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        words = [json.dumps({"path": path, "plan": asdict(plan)}), str(result)]
        command = [sys.executable, "-m", "benchmarks.vllm_cache", "--measure", *words]
        subprocess.run(command, cwd=ROOT, env={**environment, **os.environ}, check=True)
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--llm", type=Path, help="folder of the LLM; default: random weights")
    parser.add_argument("--model", type=Path, help='folder of a checkpoint with fusion "cache" that was made of it')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, for seconds only")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "vllm-cache.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what a process of its own measures
    arguments = parser.parse_args()
    if arguments.measure:
        given = json.loads(arguments.measure[0])
        write_json(arguments.measure[1], measure(given["path"], Plan(**given["plan"])))
        return
    plan = Plan(dtype=arguments.dtype, eager=arguments.eager, **(TINY if arguments.tiny else {}))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        llm, model = arguments.llm, arguments.model
        if llm is None or model is None:
            llm, model = make_models(Path(folder), TINY_SIZES if arguments.tiny else SIZES)
        config = AutoConfig.from_pretrained(model)
        result: dict[str, Any] = {"random_weights": arguments.llm is None}
        for name, path in (("llm", llm), ("model", model)):
            print(f"{name} ...", flush=True)
            result[name] = in_process(str(path), plan)
    result["model_by_llm"] = {}
    for level in (f"{clients} clients" for clients in plan.clients):
        llm_speed, speed = (result[name][level]["tokens_per_second"] for name in ("llm", "model"))
        result["model_by_llm"][level] = speed / llm_speed
        print(
            f"{level:>11}: LLM {llm_speed:6.0f}, model {speed:6.0f} tokens per second, {speed / llm_speed:.2f} times"
        )
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    for name, part in (("llm", config.encoder), ("slm", config.decoder)):
        result[f"{name}_sizes"] = {size: getattr(part, size) for size in sizes}
    package = importlib.metadata.packages_distributions()["vllm"]
    result |= {"vllm": {name: importlib.metadata.version(name) for name in set(package)}, **asdict(plan)}
    result |= {"cores": len(os.sched_getaffinity(0)), "seconds_of_all": time.perf_counter() - start}
    write_json(arguments.output, result | {"versions": versions()})


if __name__ == "__main__":
    main()
