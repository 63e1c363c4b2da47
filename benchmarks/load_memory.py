"""
Compare the peak anonymous memory of `from_pretrained` with the weights that it loads, in separate processes.

    python benchmarks/load_memory.py --output docs/results/load-memory.json

Writes a checkpoint with the sizes of a preset and random float32 weights to a temporary folder (about 1.9 GB for
t5-large_gpt2), then loads it in float32, in bfloat16, and with only the LLM in bfloat16. RssAnon is read every
millisecond, and the memory of the imports is subtracted. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


LOADS: dict[str, dict[str, str]] = {
    "as saved (float32)": {},
    "dtype=bfloat16": {"dtype": "bfloat16"},
    "encoder_dtype=bfloat16": {"encoder_dtype": "bfloat16"},
}


def rss_anon() -> int:
    """Return the anonymous resident memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def load(folder: str, kwargs: dict[str, str]) -> dict[str, Any]:
    """Load the checkpoint in this process; return the peak memory and the weights, in bytes."""
    from transformers import AutoModelForSeq2SeqLM

    import modeling_llm2slm  # noqa: F401 - registers the model

    baseline, peak, done = rss_anon(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, rss_anon())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, **kwargs)
    done.set()
    sampler.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"weights": weights, "peak": peak - baseline, "ratio": (peak - baseline) / weights}


def measure(preset: str) -> dict[str, Any]:
    """Write the checkpoint, load it in each way in a new process, and return the reports."""
    from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

    config = LLM2SLMConfig.from_pretrained(Path(__file__).parent.parent / "configuration" / f"{preset}.json")
    config.encoder_dtype = None
    results: dict[str, Any] = {"preset": preset}
    with tempfile.TemporaryDirectory() as folder:
        LLM2SLMForConditionalGeneration(config).save_pretrained(folder)
        for name, kwargs in LOADS.items():
            command = [sys.executable, __file__, "--folder", folder, "--kwargs", json.dumps(kwargs)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name] = json.loads(output.splitlines()[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="t5-large_gpt2")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--kwargs", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(load(args.folder, json.loads(args.kwargs))))
        return
    report = measure(args.preset)
    print(json.dumps(report, indent=2))
    if args.output:
        from modeling_llm2slm.data.records import write_json

        write_json(args.output, report)


if __name__ == "__main__":
    main()
