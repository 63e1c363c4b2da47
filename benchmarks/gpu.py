"""
Time LLM and LLM-to-SLM on one GPU: three sizes of T5, each alone and with three SLMs, in bfloat16 with random weights.

    python -m benchmarks.gpu                                        # within nine minutes
    python -m benchmarks.gpu --tiny --device cpu --output /tmp/gpu.json

A cell is an LLM, a way to compute (eager, or with a static cache and a compiled step) and a batch size. Contestants
take turns. If vLLM is installed, it also runs the decoder-only SLMs behind the smallest LLM. The floor of a step is
the time in which the GPU reads the weights that a step reads; keys and values are not counted. Cells are saved as
they come to docs/results/gpu.json, the most informative first, until the minutes are over. A repeated run measures
those missing.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, CompileConfig, LlamaConfig, PreTrainedConfig, T5EncoderModel, set_seed

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.contestants import endless
from modeling_llm2slm.benchmark.machine import bandwidth, device_name
from modeling_llm2slm.benchmark.models import tokenizer_of
from modeling_llm2slm.conversion.build import preset_config
from modeling_llm2slm.data.parsing import read_json
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.timing import Timing, median_timing, seconds_of, time_in_turns, time_tokens
from modeling_llm2slm.files_llm2slm import first_line
from modeling_llm2slm.inference.parts import decoding_modules
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.parts_llm2slm import slm_class


OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "gpu.json"
LLMS, SLMS = ("t5-large", "flan-t5-xl", "t5-3b"), ("gpt2", "smollm-135m", "t5-small")
MODES, BATCHES = ("eager", "compiled", "vllm"), (1, 8, 64)
FIRST_GUESS = {"eager": 30.0, "compiled": 120.0, "vllm": 120.0}  # seconds of a cell before one was measured
SMOLLM = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY_SMOLLM = {**SMOLLM, "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_SMOLLM |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def config_of(llm: str, slm: str, tiny: bool = False) -> LLM2SLMConfig:
    """Return the config of an LLM and an SLM of these sizes, or of a tiny pair of the same kinds."""
    config = preset_config("tiny" if tiny else f"{llm}_gpt2")
    if slm == "smollm-135m":
        config.decoder = LlamaConfig(**(TINY_SMOLLM if tiny else SMOLLM))
    elif slm == "t5-small":
        config.decoder = full(config.encoder) if tiny else preset_config("t5-large_t5-small").decoder
    same = slm == "t5-small"  # T5-small has the LLM's tokenizer
    return LLM2SLMConfig(encoder=config.encoder, decoder=config.decoder, fusion=config.fusion, shared_tokenizer=same)


def full(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the encoder-decoder model that an LLM's config belongs to."""
    return type(config)(**config.to_dict() | {"is_encoder_decoder": True, "dtype": "bfloat16"})


def make_models(name: str, device: str, tiny: bool = False) -> dict[str, Any]:
    """Return an LLM and an LLM-to-SLM model for each SLM, in bfloat16; all share the encoder's weights."""
    set_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            llm = AutoModelForSeq2SeqLM.from_config(full(config_of(name, "gpt2", tiny).encoder))
            models = {"llm": llm, **{slm: with_slm(llm, config_of(name, slm, tiny)) for slm in SLMS}}
    finally:
        torch.set_default_dtype(before)
    return {name: endless(model.eval()) for name, model in models.items()}


def with_slm(llm: Any, config: LLM2SLMConfig) -> LLM2SLMForConditionalGeneration:
    """Return an LLM-to-SLM model that shares the encoder of a T5; its other weights are random."""
    with torch.device("meta"):
        reader = T5EncoderModel(config.encoder)
    reader.shared, reader.encoder = llm.shared, llm.encoder
    return LLM2SLMForConditionalGeneration(config, reader, slm_class(config.decoder).from_config(config.decoder))


def step_bytes(model: Any) -> int:
    """Return the bytes of the weights that a decoding step reads: of an untied embedding, next to none."""
    slm: Any = model.decoder if isinstance(model, LLM2SLMForConditionalGeneration) else model
    weights = {weight for part in decoding_modules(slm) for weight in part.parameters()}
    if slm.get_output_embeddings().weight is not (embedding := slm.get_input_embeddings().weight):
        weights.discard(embedding)
    return sum(weight.nbytes for weight in weights)


def contestant(model: Any, mode: str, cell: Cell) -> Callable[[Any], Timing]:
    """Return what times a model on a cell."""
    vocab_size = getattr(model.config, "encoder", model.config).vocab_size
    ids = cell.ids(vocab_size).to(model.device)
    options: dict[str, Any] = {}
    if mode == "compiled":
        compiling = CompileConfig(fullgraph=True, dynamic=False)
        compiling._compile_all_devices = True  # for a test on a CPU
        options = {"cache_implementation": "static", "compile_config": compiling}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda _: time_tokens(model, inputs, cell.output, **options)


def time_vllm(
    llm: str, slm: str, device: str, tiny: bool, cells: Sequence[Cell], rounds: int
) -> tuple[int, list[list[Timing]]]:
    """Return the bytes of a step and timings of each cell, with the SLM in vLLM; run it in a process of its own."""
    model = make_models(llm, device, tiny)[slm]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        readers = [tokenizer_of(part) for part in (model.config.encoder, model.config.decoder)]
        LLM2SLMProcessor(*readers).save_pretrained(folder)
        size, vocab_size = step_bytes(model), model.config.encoder.vocab_size
        del model
        gc.collect()
        torch.cuda.empty_cache()  # vLLM takes 90 % of the memory, and refuses to start if less is free
        loaded = TextToText.from_pretrained(folder, engine="vllm", dtype="bfloat16", device=device)

        def seconds(prompts: list[str], tokens: int) -> float:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            return seconds_of(partial(loaded.generate_tokens, prompts, batch_size=len(prompts), **options))

        timings = []
        for cell in cells:
            prompts = [" ".join(f"w{index}" for index in row) for row in cell.ids(vocab_size).tolist()]
            seconds(prompts, cell.output)
            # The time of a shorter output gives the first token's.
            pairs = [(seconds(prompts, 1), seconds(prompts, cell.output)) for _ in range(rounds)]
            each = [(total, first, (total - first) / (cell.output - 1)) for first, total in pairs]
            timings.append([Timing(total, cell.output, first, token) for total, first, token in each])
    return size, timings


def row_of(timings: list[Timing], cell: Cell, step: int, bytes_per_second: float) -> dict[str, Any]:
    """Return what is stored of a contestant whose step reads `step` bytes."""
    median = median_timing(timings)
    assert median.per_token is not None
    assert median.first is not None
    floor = step / bytes_per_second
    return {
        "seconds": median.total,
        "first_token_ms": 1000 * median.first,
        "ms_per_token": 1000 * median.per_token,  # of every output in the batch
        "tokens_per_second": cell.batch * cell.output / median.total,
        "floor_ms": 1000 * floor,
        "share_of_floor": floor / median.per_token,
        "rounds": [asdict(timing) for timing in timings],
    }


def plan(modes: Sequence[str], batches: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """Yield mode, LLM and batch size of each cell of PyTorch: eager mode first, whose cells take seconds."""
    by_use = sorted(batches, key=lambda batch: (batch != 1, -batch))
    for mode in ("eager", "compiled"):
        if mode in modes:
            yield from ((mode, llm, batch) for batch in by_use for llm in LLMS)


class GPUBenchmark:
    """
    A run over cells.

    Args:
        output: File of the results, which a repeated run completes.
        device: Device of all models.
        minutes: No cell starts that is expected to end later than this.
        tiny: Tiny models and lengths.
        rounds: Rounds of each cell; medians are stored.

    Raises:
        ValueError: If the output was measured on another device or with other versions, sizes or rounds.
    """

    def __init__(self, output: Path, device: str, minutes: float, tiny: bool = False, rounds: int = 3):
        self.output, self.device, self.tiny, self.rounds = output, device, tiny, rounds
        self.end = time.monotonic() + 60 * minutes
        self.longest: dict[str, float] = {}  # seconds, by mode
        self.models: dict[str, dict[str, Any]] = {}
        name = device_name(device)
        setting = {"device": name, "tiny": tiny, "rounds": rounds, "dtype": "bfloat16", "versions": versions()}
        self.result: dict[str, Any] = {"setting": setting, "gigabytes_per_second": None, "cells": {}}
        if output.is_file():
            self.result = read_json(output)
            if self.result.get("setting") != setting:
                raise ValueError(f"{output} was measured in another setting. Choose another file, or remove it.")

    def run(self, modes: Sequence[str] = MODES, batches: Sequence[int] = BATCHES) -> None:
        """Measure the missing cells for which there is time."""
        if self.result["gigabytes_per_second"] is None:
            size = 2**22 if self.tiny else 2**32
            self.result["gigabytes_per_second"] = bandwidth(size, self.device) / 1e9
        for mode, llm, batch in plan(modes, batches):
            key = f"{llm} {mode} batch {batch}"
            if key not in self.result["cells"] and self.has_time(mode, key):
                start = time.monotonic()
                self.save(key, self.measure(mode, llm, batch))
                self.longest[mode] = max(self.longest.get(mode, 0), time.monotonic() - start)
        if "vllm" in modes and find_spec("vllm"):
            self.models.clear()
            self.run_vllm(LLMS[0], batches)

    def has_time(self, mode: str, key: str) -> bool:
        """Return whether a cell is expected to end in time, and print it if not."""
        found = time.monotonic() + self.longest.get(mode, FIRST_GUESS[mode]) <= self.end
        if not found:
            print(f"{key}: no time left", flush=True)
        return found

    def save(self, key: str, cell: dict[str, Any]) -> None:
        """Store a cell, and print it."""
        self.result["cells"][key] = cell
        write_json(self.output, self.result)
        print(line(key, cell), flush=True)

    def measure(self, mode: str, llm: str, batch: int) -> dict[str, Any]:
        """Return the rows of a cell, and the error of each contestant that fails: the others run."""
        if llm not in self.models:
            self.models[llm] = make_models(llm, self.device, self.tiny)
        models, cell, errors = self.models[llm], self.cell(batch), {}
        turns = {name: contestant(model, mode, cell) for name, model in models.items()}
        for name in models:
            try:
                turns[name](None)  # compiles
            except Exception as error:  # noqa: BLE001 - whatever it is, the result names it
                errors[name] = first_line(error)
                del turns[name]
        timings = time_in_turns(turns, [None] * self.rounds) if turns else {}
        speed = 1e9 * self.result["gigabytes_per_second"]
        rows = {name: row_of(own, cell, step_bytes(models[name]), speed) for name, own in timings.items()}
        for row in rows.values() if "llm" in rows else ():
            row["speedup"] = rows["llm"]["seconds"] / row["seconds"]
        torch.compiler.reset()
        return {"results": rows, "errors": errors}

    def run_vllm(self, llm: str, batches: Sequence[int]) -> None:
        """Measure the decoder-only SLMs in vLLM, each in a process of its own: an engine frees no memory."""
        gc.collect()
        torch.cuda.empty_cache()
        for slm in SLMS[:2]:
            key, cells = f"{llm} vllm {slm}", [self.cell(batch) for batch in batches]
            if key in self.result["cells"] or not self.has_time("vllm", key):
                continue
            arguments = (llm, slm, self.device, self.tiny, cells, self.rounds)
            rows, errors, speed = {}, {}, 1e9 * self.result["gigabytes_per_second"]
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    size, timings = pool.submit(time_vllm, *arguments).result()
                for cell, own in zip(cells, timings, strict=True):
                    rows[f"batch {cell.batch}"] = row_of(own, cell, size, speed)
            except Exception as error:  # noqa: BLE001 - whatever it is, the result names it
                errors[slm] = first_line(error)
            self.save(key, {"results": rows, "errors": errors})

    def cell(self, batch: int) -> Cell:
        """Return a cell of a batch size: 64 tokens of prompt and output, or 8 if tiny."""
        length = 8 if self.tiny else 64
        return Cell(length, length, batch)


def line(key: str, cell: dict[str, Any]) -> str:
    """Return a cell in one line."""
    rows = [
        f"{name} {row['ms_per_token']:.2f} ms a token, {row['share_of_floor']:.0%} of the floor's speed"
        + (f", {row['speedup']:.1f} times as fast" if "speedup" in row else "")
        for name, row in cell["results"].items()
    ]
    return f"{key}: " + "; ".join([*rows, *(f"{name}: {error}" for name, error in cell["errors"].items())])


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the results")
    parser.add_argument("--device", default="cuda", help="device of all models")
    parser.add_argument("--minutes", type=float, default=9, help="no cell starts that would end later")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each cell; medians are stored")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="ways to compute")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="batch sizes")
    parser.add_argument("--tiny", action="store_true", help="tiny models and lengths, for a test without a GPU")
    arguments = parser.parse_args()
    try:
        benchmark = GPUBenchmark(
            arguments.output, arguments.device, arguments.minutes, arguments.tiny, arguments.rounds
        )
    except ValueError as error:
        raise SystemExit(str(error)) from None
    benchmark.run(arguments.modes, arguments.batches)


if __name__ == "__main__":
    main()
