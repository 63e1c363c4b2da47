"""
Time the LLM and LLM-to-SLM in every engine that is installed, in turns, on random weights.

    python -m benchmarks.engines --work runs/engines --prepare      # exports, compiles and loads: long, and kept
    python -m benchmarks.engines --work runs/engines                # measures: minutes, on a quiet machine

`--only` runs one or more parts:

- `multi30k`: an LLM of 15 + 15 layers (16.6M parameters) and a T5 of 2 + 2 layers, 16 prompt and 20 output tokens.
- `step`: the demo's LLM and SLM (0.94M parameters). `fixed_ms` is what a token takes above reading its weights.
- `t5-large_gpt2`, `t5-large_t5-small`: 64 prompt and 64 output tokens, int8 on both sides. Each needs 7 GB of disk.
- `files`: 2,000 prompts of Multi30k with the models of `multi30k`, against CTranslate2's own batches. Needs `--data`.

One thread, medians of five alternating rounds. `prepare` leaves out an engine that fails, and says why. The speed-up
compares with the fastest LLM, whatever its weights lose. An LLM-to-SLM row counts if it keeps 99 % of the LLM's BLEU
in docs/results/multi30k-en-de.json, where models of the sizes of `multi30k` were trained: `quality` is that share.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, T5Config

from benchmarks.engines_files import LLM, measure_files
from modeling_llm2slm import LLM2SLMConfig
from modeling_llm2slm.benchmark.benchmark import Benchmark
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.contestants import contestants
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.conversion.build import preset_config
from modeling_llm2slm.data.parsing import read_json
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.files_llm2slm import first_line
from modeling_llm2slm.inference.engine import BenchmarkModels
from modeling_llm2slm.settings import BenchmarkSettings


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
FILES = "files"
# Slow to compile, or slower than bfloat16; bfloat16 is slower than int8; the steps of the last are those of fp32.
LEFT_OUT = ("llm-compiled", "llm2slm-compiled", "llm2slm-int8", "llm-openvino-bf16", "llm2slm-openvino-bf16",
            "llm-inductor-int8")  # fmt: skip
FLOAT32 = ("llm", "llm2slm", "fp32", "float32")  # how names end whose tokens are those of PyTorch, which tests check
INT8 = ("llm-ctranslate2-int8", "llm-openvino-int8", "llm-onnx-int8", "llm-llamacpp-int8", "llm2slm-openvino-int8",
        "llm2slm-onnx-int8", "llm2slm-llamacpp-int8")  # fmt: skip
TRAINED = {"llm": "llm", "llm2slm": "t5-cut-add-distilled"}  # rows of the experiment, in PyTorch
QUANTIZED = {"llm-ctranslate2-int8": "llm-int8", "llm2slm-openvino-int8": "t5-cut-add-distilled-int8"}
KEPT = 0.99


@dataclass(frozen=True)
class Part:
    """Models, and what is measured of them: prompt and output length, batch and beams of each cell."""

    config: LLM2SLMConfig
    cells: tuple[tuple[int, int, int, int], ...]
    names: tuple[str, ...] = ()
    is_trained: bool = False  # models of these sizes were trained, and scored in docs/results/multi30k-en-de.json

    def contestants(self, wanted: list[str] | None = None) -> list[str]:
        """Return the names of all contestants, or of those among them that are wanted, that are installed."""
        return [
            name
            for name, one in contestants().items()
            if one.can_run
            and name not in LEFT_OUT
            and name in (self.names or contestants())
            and name in (wanted or contestants())
        ]


def parts(tiny: bool) -> dict[str, Part]:
    """Return the parts by name; tiny ones test this script."""
    size = {"d_model": 192, "d_kv": 64, "num_heads": 3, "d_ff": 768, "vocab_size": 6000, "decoder_start_token_id": 0}
    llm, slm = (1, 1) if tiny else (15, 2)
    demo = ROOT / "examples" / "demo"
    demo_llm = json.loads((demo / "llm" / "config.json").read_text(encoding="utf-8"))
    demo_slm = json.loads((demo / "gpt2.json").read_text(encoding="utf-8"))
    multi30k = LLM2SLMConfig(
        encoder=T5Config(**size, num_layers=llm, num_decoder_layers=llm),
        decoder=T5Config(**size, num_layers=slm, num_decoder_layers=slm),
        shared_tokenizer=True,
    )
    step = LLM2SLMConfig(encoder=T5Config(**demo_llm), decoder=GPT2Config(**demo_slm | {"bos_token_id": 0}))
    all_llm2slm = tuple(name for name, one in contestants().items() if one.model == "llm2slm")
    return {
        "multi30k": Part(multi30k, ((16, 20, 1, 1), (16, 20, 32, 1), (16, 20, 1, 4)), is_trained=True),
        "step": Part(step, ((16, 40, 1, 1),), all_llm2slm),
        "t5-large_gpt2": Part(preset_config("tiny" if tiny else "t5-large_gpt2"), ((64, 64, 1, 1),), INT8),
        "t5-large_t5-small": Part(preset_config("tiny" if tiny else "t5-large_t5-small"), ((64, 64, 1, 1),), INT8),
    }


def models_of(folder: Path, config: LLM2SLMConfig) -> BenchmarkModels:
    """Write models of these sizes with random weights, once."""
    config.save_pretrained(folder / "sizes")
    return make_models(str(folder / "sizes" / "config.json"), folder)


def benchmark(part: Part, folder: Path, names: list[str], rounds: int) -> Benchmark:
    """Return the benchmark of some contestants. Costs of loading are stored; times are always measured again."""
    models, output = models_of(folder, part.config), folder / "result.json"
    if output.is_file():
        write_json(output, {**read_json(output), "cells": {}})
    cells = [
        Cell(prompt=prompt, output=length, batch=batch, beams=beams, contestants=tuple(names), repeats=rounds)
        for prompt, length, batch, beams in part.cells
    ]
    return Benchmark(cells, output, folder, BenchmarkSettings(threads=1), models, progress=_show)


def prepare(part: Part, folder: Path, wanted: list[str] | None) -> None:
    """Make and load each contestant."""
    for name in part.contestants(wanted):
        try:
            benchmark(part, folder, [name], 1).run(prepare_only=True)
        except Exception as error:  # of any engine, and others can be measured nevertheless
            _show(f"{name} is left out: {first_line(error)}")


def measure(part: Part, folder: Path, rounds: int, wanted: list[str] | None) -> dict[str, Any]:
    """Return the result of the contestants that were prepared."""
    stored = folder / "result.json"
    prepared = read_json(stored)["contestants"].get("given", {}) if stored.is_file() else {}
    names = [name for name in part.contestants(wanted) if name in prepared]
    if not names:
        raise SystemExit(f"{folder} has no contestants yet. Run with --prepare first.")
    qualities = quality() if part.is_trained else {}
    result = benchmark(part, folder, names, rounds).run()
    for cell in result["cells"].values():
        for name, row in cell["results"].items():
            row["quality"] = qualities.get(name)
            if "floor_ms_per_token" in row:
                row["fixed_ms"] = row["ms_per_token"] - row["floor_ms_per_token"]
        cell["best"] = best(cell["results"])
    result["left_out"] = [name for name in part.contestants() if name not in names]
    return result


def quality() -> dict[str, float]:
    """Return the share of the LLM's BLEU that each contestant keeps with greedy search, where it was measured."""
    rows = read_json(RESULTS / "multi30k-en-de.json")["rows"]
    parts_of = {name: name.split("-") for name in contestants()}
    exact = {name: TRAINED.get(one[0]) for name, one in parts_of.items() if one[-1] in FLOAT32}
    return {name: rows[row]["relative_1"] for name, row in {**exact, **QUANTIZED}.items() if row}


def best(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the fastest LLM, the fastest LLM-to-SLM whose quality counts, and their ratio; and the fastest of all."""

    def fastest(names: list[str]) -> str | None:
        return min(names, key=lambda name: rows[name]["seconds"], default=None)

    small = [name for name in rows if name.startswith("llm2slm")]
    found: dict[str, Any] = {
        "llm": fastest([name for name in rows if name not in small and name != "slm"]),
        "llm2slm": fastest([name for name in small if (rows[name]["quality"] or 0) >= KEPT]),
        "llm2slm_any": fastest(small),
    }
    for key, name in list(found.items())[1:]:
        if found["llm"] and name:
            found[key.replace("llm2slm", "speedup")] = rows[found["llm"]]["seconds"] / rows[name]["seconds"]
    return found


def table(name: str, result: dict[str, Any]) -> str:
    """Return what was measured as text."""
    lines = []
    for key, cell in result["cells"].items():
        lines.append(f"{name} {key}" + (" (disturbed)" if cell["noisy"] else ""))
        for contestant, row in sorted(cell["results"].items(), key=lambda item: item[1]["seconds"]):
            fixed = f"{row['fixed_ms']:8.3f} fixed" if "fixed_ms" in row else ""
            kept = f"{100 * row['quality']:6.1f} % of BLEU" if row["quality"] else ""
            lines.append(
                f"  {contestant:28}{1000 * row['seconds']:10.1f} ms {row['first_token_ms']:8.1f} first "
                f"{row['ms_per_token']:8.3f} token {fixed} {kept}"
            )
        for kind in ("llm2slm", "llm2slm_any"):
            found = cell["best"]
            if (speedup := found.get(kind.replace("llm2slm", "speedup"))) is not None:
                lines.append(f"  {found[kind]} is {speedup:.2f} times as fast as {found['llm']}.")
    return "\n".join(lines)


def _show(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "engines.json")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLM2SLM_DATA", "data")))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*parts(tiny=True), FILES], default=["multi30k", "step"])
    parser.add_argument("--contestants", nargs="+", help="only these, such as llm-ctranslate2-int8")
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and measure nothing")
    parser.add_argument("--tiny", action="store_true", help="measure models of one layer, to test this script")
    parser.add_argument("--note", help="remark that is saved with each result")
    arguments = parser.parse_args()
    if unknown := set(arguments.contestants or ()) - set(contestants()):
        parser.error(f"{unknown.pop()} is no contestant. Choose from: {', '.join(contestants())}.")
    torch.set_num_threads(1)
    chosen = parts(arguments.tiny)
    for name in arguments.only:
        folder = arguments.work / (name if name != FILES else "multi30k")
        if arguments.prepare:
            if name != FILES:
                prepare(chosen[name], folder, arguments.contestants)
            continue
        if name == FILES:
            models = benchmark(chosen["multi30k"], folder, [LLM], 1).given
            assert models is not None
            result = measure_files(models, arguments.data, arguments.rounds, 64 if arguments.tiny else 2000)
            _show(json.dumps(result, indent=2))
        else:
            result = measure(chosen[name], folder, arguments.rounds, arguments.contestants)
            _show(table(name, result))
        stored = read_json(arguments.output) if arguments.output.is_file() else {}
        write_json(arguments.output, {**stored, name: {**result, "note": arguments.note}})


if __name__ == "__main__":
    main()
