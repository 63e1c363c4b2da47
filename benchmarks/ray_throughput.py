"""
Measure `llm2slm generate --ray` with one and with two workers, against one process.

    make demo && python -m benchmarks.ray_throughput        # with modeling-llm2slm[ray]; needs two cores

The prompts are the first of the demonstration's training data; decoding is greedy. Ray runs on this machine, and each
worker has one thread. Outputs per second count from 20 to 90 % of all outputs, when every worker has its model;
seconds include the start of the cluster and of the workers. All runs must write the same file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from examples.demo import DATA
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.settings import GenerateFileSettings, RaySettings


ROOT = Path(__file__).parents[1]
WAYS = {
    "one process": RaySettings(),
    "Ray, 1 worker": RaySettings(ray="local", ray_workers=1),
    "Ray, 2 workers": RaySettings(ray="local", ray_workers=2),
}
FROM, TO = 0.2, 0.9


def measure(model: str, output: Path, settings: GenerateFileSettings, ray: RaySettings) -> dict[str, float]:
    """Generate for the file, and return seconds and outputs per second."""
    counts: list[tuple[float, int, int]] = []
    start = time.perf_counter()
    report = generate_file(
        model, DATA["train"], output, settings, ray=ray,
        progress=lambda done, total: counts.append((time.perf_counter(), done, total)),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    steady = [(at, done) for at, done, total in counts if FROM <= done / total <= TO]
    (first, done_first), (last, done_last) = steady[0], steady[-1]
    return {
        "seconds": seconds,
        "outputs": counts[-1][2],
        "tokens": report.tokens,
        "outputs_per_second": (done_last - done_first) / (last - first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/llm2slm", help="An LLM-to-SLM checkpoint.")
    parser.add_argument("--limit", type=int, default=1500, help="Number of prompts.")
    parser.add_argument("--batch-size", type=int, default=16, help="Prompts per batch.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "ray-throughput.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = GenerateFileSettings(
        limit=arguments.limit, batch_size=arguments.batch_size, batch_tokens=None, max_new_tokens=48, overlap=False
    )
    result: dict[str, object] = {}
    table = Table("", "seconds, with start", "outputs per second", "tokens")
    written: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, ray in WAYS.items():
            output = Path(folder, f"{len(written)}-{len(result)}.jsonl")
            found = result[name] = measure(arguments.model, output, settings, ray)
            written.add(output.read_bytes())
            table.add_row(
                name, f"{found['seconds']:.1f}", f"{found['outputs_per_second']:.1f}", f"{found['tokens']:,}"
            )
    result |= {"same_outputs": len(written) == 1, "batch_size": arguments.batch_size, "cores": os.cpu_count()}
    write_json(arguments.output, result | {"versions": versions()})
    Console().print(table)
    if len(written) > 1:
        raise SystemExit("The runs wrote different outputs.")


if __name__ == "__main__":
    main()
