"""
Time the LLM and LLM-to-SLM in every engine that is installed, on random weights of the sizes of Multi30k and the demo.

    python -m benchmarks.engines --work runs/engines

`multi30k` is an LLM of 15 + 15 layers (16.6M parameters) with a T5 of 2 + 2 layers, at 16 prompt and 20 output tokens,
one thread, batch 1 and 32, five alternating rounds. `step` is the demo's LLM and SLM (0.94M parameters): `fixed_ms` is
the time of a token above the time of reading its weights. Exporting comes first and takes minutes; a repeated run
continues. `--only step` or `--only multi30k` runs one of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import GPT2Config, T5Config

from modeling_llm2slm import LLM2SLMConfig
from modeling_llm2slm.benchmark.benchmark import Benchmark
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.contestants import contestants
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.settings import BenchmarkSettings


ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "engines.json"
LEFT_OUT = ("llm-compiled", "llm2slm-compiled", "llm2slm-int8")  # slow to compile; slower than bfloat16
CELLS = {"multi30k": ((16, 20, 1), (16, 20, 32)), "step": ((16, 40, 1),)}  # prompt, output, batch


def configs(tiny: bool) -> dict[str, LLM2SLMConfig]:
    """Return the config of each pair of models; tiny ones test this script."""
    size = {"d_model": 192, "d_kv": 64, "num_heads": 3, "d_ff": 768, "vocab_size": 6000, "decoder_start_token_id": 0}
    llm, slm = (1, 1) if tiny else (15, 2)
    demo = ROOT / "examples" / "demo"
    demo_llm = json.loads((demo / "llm" / "config.json").read_text(encoding="utf-8"))
    demo_slm = json.loads((demo / "gpt2.json").read_text(encoding="utf-8"))
    return {
        "multi30k": LLM2SLMConfig(
            encoder=T5Config(**size, num_layers=llm, num_decoder_layers=llm),
            decoder=T5Config(**size, num_layers=slm, num_decoder_layers=slm),
            shared_tokenizer=True,
        ),
        "step": LLM2SLMConfig(encoder=T5Config(**demo_llm), decoder=GPT2Config(**demo_slm | {"bos_token_id": 0})),
    }


def measure(name: str, config: LLM2SLMConfig, work: Path, rounds: int) -> dict[str, Any]:
    """Return the result of the benchmark of one pair of models."""
    folder = work / name
    config.save_pretrained(folder / "sizes")
    models = make_models(str(folder / "sizes" / "config.json"), folder)
    # Any engine may be missing; the others are measured.
    names = [key for key, one in contestants().items() if one.can_run and key not in LEFT_OUT]
    if name == "step":
        names = [key for key in names if key.startswith("llm2slm")]
    cells = [
        Cell(prompt=prompt, output=output, batch=batch, contestants=tuple(names), repeats=rounds)
        for prompt, output, batch in CELLS[name]
    ]
    settings = BenchmarkSettings(threads=1)
    result = Benchmark(cells, folder / "result.json", folder, settings, models, progress=print).run()  # noqa: T201
    for cell in result["cells"].values():
        for row in cell["results"].values():
            if "floor_ms_per_token" in row:
                row["fixed_ms"] = row["ms_per_token"] - row["floor_ms_per_token"]
    return result


def table(results: dict[str, Any]) -> str:
    """Return what was measured as text."""
    lines = []
    for name, result in results.items():
        for key, cell in result["cells"].items():
            lines.append(f"{name} {key}" + (" (disturbed)" if cell["noisy"] else ""))
            for contestant, row in sorted(cell["results"].items(), key=lambda item: item[1]["seconds"]):
                fixed = f"{row['fixed_ms']:8.3f} fixed" if "fixed_ms" in row else ""
                lines.append(
                    f"  {contestant:28}{1000 * row['seconds']:10.1f} ms {row['first_token_ms']:8.1f} first "
                    f"{row['ms_per_token']:8.3f} token {fixed}"
                )
            best = cell["best"]
            if "speedup" in best:
                lines.append(f"  {best['llm2slm']} is {best['speedup']:.2f} times as fast as {best['llm']}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(CELLS))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    results = {
        name: measure(name, config, arguments.work, arguments.rounds)
        for name, config in configs(arguments.tiny).items()
        if arguments.only in (None, name)
    }
    write_json(arguments.output, results)
    print(table(results))  # noqa: T201


if __name__ == "__main__":
    main()
