"""
What exported weights cost in BLEU: a checkpoint and its exports on the same pairs, greedy.

    python benchmarks/quantized_quality.py runs/multi30k/en-de/t5-add/model data/multi30k/en-de/val.jsonl.gz \\
        --prompt-column source --target-column target --output docs/results/quantized-quality.json

Every row answers all pairs in batches, which are sorted by length and padded. `same_answers` is the part of the
answers that are those of PyTorch to the letter. A row may lose `--allowed` BLEU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.conversion import export
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.metrics import score_and_sign
from modeling_llm2slm.inference.text_to_text import TextToText


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for PyTorch and one for each export."""
    torch.set_num_threads(arguments.threads)
    pairs = load_examples(arguments.data, arguments.prompt_column, arguments.target_column)
    prompts, references = pairs["prompt"][:], pairs["target"][:]
    rows: dict[str, dict[str, Any]] = {}
    expected: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pytorch", *arguments.exports):
            path = arguments.model
            if name != "pytorch":
                runtime, weights = name.split("-")
                path = Path(folder, name)
                export(arguments.model, path, engine=runtime, weights=weights)
            text_to_text = TextToText.from_pretrained(path)
            start = time.perf_counter()
            answers = text_to_text.generate(prompts, arguments.batch_size, max_new_tokens=64)
            seconds = time.perf_counter() - start
            expected = expected or answers
            scores, signatures = score_and_sign(answers, references, ("bleu", "chrf"))
            rows[name] = {
                **scores,
                "bleu_lost": (rows["pytorch"]["bleu"] if rows else scores["bleu"]) - scores["bleu"],
                "same_answers": sum(map(str.__eq__, answers, expected)) / len(answers),
                "seconds": seconds,
            }
            print(name, rows[name], flush=True)
    return {
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "pairs": len(prompts),
        "batch_size": arguments.batch_size,
        "allowed": arguments.allowed,
        "within": {name: row["bleu_lost"] <= arguments.allowed for name, row in rows.items()},
        "rows": rows,
        "signatures": signatures,
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--target-column", default="target")
    parser.add_argument(
        "--exports", nargs="*", default=["openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int4"]
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--allowed", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
