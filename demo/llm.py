"""Makes the LLM that the demonstration ships: a T5, trained from random weights on more pairs than the SLM gets.

    python -m demo.llm

writes corpus, tokenizer, first weights and checkpoints to `runs/demo-llm`, trains by `recipes/llm.yaml` and puts the
result, rounded to bfloat16, into `demo/llm`. A run that was stopped continues where it was.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import T5ForConditionalGeneration

from demo import corpus
from demo.tokenizer import train_tokenizer
from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.data.files import atomic_write
from modeling_llm2slm.training.training import load_recipe, train


RECIPES = Path(__file__).parent / "recipes"
LLM = Path(__file__).parent / "llm"
LLM_PAIRS = 48_000  # its training pairs, each seen once; the SLM gets the first of them
BATCH = 32
TOKENIZER_PAIRS = 30_000
VOCABULARY = 1000


def make_llm(folder: Path, shipped: Path = LLM) -> None:
    """
    Trains the LLM and ships it.

    Args:
        folder: For all that is not shipped.
        shipped: For the LLM, its tokenizer and the record of its training.
    """
    splits = corpus.splits(LLM_PAIRS)
    files = corpus.write_splits(folder / "corpus", splits, BATCH)
    start, trained = folder / "start", folder / "trained"
    texts = [text for row in splits["train"][:TOKENIZER_PAIRS] for text in row.values()]
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder / "tokenizer")
    with atomic_write(start) as aside:
        build(str(RECIPES / "t5.json"), llm_tokenizer=str(folder / "tokenizer")).save_pretrained(aside)
    paths = {"model": str(start), "output_dir": str(trained)}
    data = {"train_data": files["train"], "validation_data": files["validation"]}
    train(load_recipe(RECIPES / "llm.yaml", paths | data))
    ship(trained, shipped)


def ship(trained: Path, folder: Path) -> None:
    """Copies what was trained, in half the bytes; it is loaded as float32 all the same."""
    model = T5ForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
    with atomic_write(folder) as aside:
        model.save_pretrained(aside)
        for name in ("tokenizer.json", "tokenizer_config.json", "training.json"):
            shutil.copy(trained / name, aside / name)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.llm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo-llm"), help="folder for all that is not shipped"
    )
    make_llm(parser.parse_args().output)


if __name__ == "__main__":
    main()
