"""
Write the data of the demo, `examples/demo/data/*.jsonl.gz`, from the grammar.

    python -m examples.demo.generator
"""

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from .corpus import in_batches, splits


DATA = Path(__file__).parents[1] / "data"
SLM_EXAMPLES = 16_000  # the first of the examples that the LLM was trained on
BATCH_SIZE = 32


def write_corpus(folder: Path, train_examples: int = SLM_EXAMPLES) -> dict[str, Path]:
    """
    Write the splits of the corpus, the training split in batches of similar length.

    Args:
        folder: The folder to write to.
        train_examples: Number of training examples.

    Returns:
        The file of each split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, examples in splits(train_examples).items():
        files[name] = folder / f"{name}.jsonl.gz"
        write_jsonl(files[name], in_batches(examples, BATCH_SIZE) if name == "train" else examples)
    return files


def write_jsonl(path: Path, examples: Sequence[dict[str, str]]) -> None:
    """Write compressed JSON lines without a time stamp, so that equal examples give equal files."""
    lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo.generator", description="Write the demo's data.")
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write to")
    write_corpus(parser.parse_args().output)


if __name__ == "__main__":
    main()
