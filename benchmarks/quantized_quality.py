"""
Measure the BLEU that exported weights lose: a checkpoint and its exports on the same examples, greedy.

    python benchmarks/quantized_quality.py runs/multi30k/en-de/t5-add/model data/multi30k/en-de/val.jsonl.gz \\
        --prompt-column source --target-column target --output docs/results/quantized-quality.json

Each row generates for all prompts in batches, which are sorted by length and padded. `same_outputs` is the share of
outputs that equal PyTorch's. A row may lose `--allowed` BLEU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.metrics import score_with_signatures
from modeling_llm2slm.evaluation.timing import seconds_of
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import DataSettings


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a row for PyTorch and one for each export."""
    torch.set_num_threads(arguments.threads)
    examples = load_examples(
        arguments.data, DataSettings(prompt_column=arguments.prompt_column), arguments.target_column
    )
    prompts, references = examples["prompt"][:], examples["target"][:]
    rows: dict[str, dict[str, Any]] = {}
    expected: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pytorch", *arguments.exports):
            path = arguments.model
            if name != "pytorch":
                engine, weights = name.split("-")
                path = Path(folder, name)
                export(arguments.model, path, engine=engine, weights=weights)
            text_to_text = TextToText.from_pretrained(path)
            outputs: list[str] = []

            def generate(model: TextToText = text_to_text, outputs: list[str] = outputs) -> None:
                outputs += model.generate(prompts, arguments.batch_size, max_new_tokens=64)

            seconds = seconds_of(generate)
            expected = expected or outputs
            scores, signatures = score_with_signatures(outputs, references, ("bleu", "chrf"))
            rows[name] = {
                **scores,
                "bleu_lost": (rows["pytorch"]["bleu"] if rows else scores["bleu"]) - scores["bleu"],
                "same_outputs": sum(map(str.__eq__, outputs, expected)) / len(outputs),
                "seconds": seconds,
            }
            print(name, rows[name], flush=True)
    return {
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "examples": len(prompts),
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
