"""
Profile a step of an SLM in OpenVINO: the time of each kind of operation, and the bandwidth of its matrix products.

    python -m benchmarks.step_profile --work runs/step-profile --weights int8

The SLM has GPT-2's sizes and random weights, and the LLM is tiny, as a step does not run it. One thread; the
median of the steps of one output, and their mean in OpenVINO's own profile. The results are in
docs/results/step-profile.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, T5Config

from modeling_llm2slm import LLM2SLMConfig
from modeling_llm2slm.benchmark.machine import bandwidth, device_name, engine_versions
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.engines.exported import MANIFEST, ExportedLLM2SLM, graph_size, read_manifest


OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "step-profile.json"
PROMPT, STEPS, FIRST = 64, 64, 4  # tokens of the prompt and the output; the first steps are not counted
LLM = T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, decoder_start_token_id=0)
GPT2 = GPT2Config()


class Profiler:
    """A streamer that reads the clock with each token, and OpenVINO's profile if there is one."""

    def __init__(self, request: Any, counts: bool):
        self.request, self.counts = request, counts
        self.times: list[float] = []
        self.totals: list[dict[str, list[float]]] = []  # milliseconds of each node in all runs so far, by kind

    def put(self, tokens: torch.Tensor) -> None:
        runs, totals = len(self.times), defaultdict(list)  # the first token is the start token
        self.times.append(1000 * time.perf_counter())
        for node in self.request.profiling_info if self.counts and runs else ():
            totals[node.node_type].append(runs * 1000 * node.real_time.total_seconds())  # a mean over the runs
        self.totals.append(totals)

    def end(self) -> None:
        """Nothing is left to read."""


def profile(folder: Path, weights: str, decoder: Any = GPT2) -> dict[str, Any]:
    """Return the median milliseconds of each kind of operation in a step, and of the step in `generate()`."""
    exported = folder / f"openvino-{weights}"
    config = LLM2SLMConfig(encoder=LLM, decoder=decoder)
    config.save_pretrained(folder / "sizes")
    models = make_models(str(folder / "sizes" / "config.json"), folder)
    if not exported.is_dir():
        export(models.llm2slm, exported, engine="openvino", weights=weights)
    manifest = read_manifest(exported)
    took = []
    for counts in (False, True):  # counting takes time itself
        manifest["llm2slm"]["options"]["step"]["PERF_COUNT"] = "YES" if counts else "NO"
        (exported / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        model = ExportedLLM2SLM.from_pretrained(exported)
        cache = model.new_cache()
        profiler = Profiler(cache.state._request, counts)
        torch.manual_seed(0)
        ids = torch.randint(3, LLM.vocab_size, (1, PROMPT))
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        model.generate(ids, past_key_values=cache, streamer=profiler, **options)
        took.append(statistics.median(after - before for before, after in pairwise(profiler.times[FIRST:])))
    before, after, counted = profiler.totals[FIRST], profiler.totals[-1], len(profiler.times) - 1 - FIRST
    kinds = {
        kind: {"nodes": sum(map(bool, nodes)), "ms": (sum(nodes) - sum(before[kind])) / counted}
        for kind, nodes in after.items()
        if any(nodes)
    }
    products = sum(one["ms"] for kind, one in kinds.items() if kind.startswith("FullyConnected"))
    size = graph_size(exported, "step")
    return {
        "ms_per_token": took[0],
        "ms_per_token_while_profiled": took[1],
        "operations": dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"])),
        "weights_bytes": size,
        "matrix_products_gb_per_second": size / products / 1e6,
        "sum_gb_per_second": bandwidth(size, "cpu") / 1e9,
    }


def main() -> None:
    """Profile and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--work", default="runs/step-profile", type=Path, help="folder of the models")
    parser.add_argument("--weights", nargs="+", default=["int8"], help="formats of the weights")
    parser.add_argument("--output", default=OUTPUT, type=Path, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"device": device_name("cpu"), "versions": engine_versions(), "weights": {}}
    for weights in arguments.weights:
        found = result["weights"][weights] = profile(arguments.work, weights)
        print(f"{weights}: {found['ms_per_token']:.1f} ms a token, {json.dumps(found['operations'])}", flush=True)
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
