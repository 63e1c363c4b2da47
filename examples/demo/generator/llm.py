"""
Train the LLM that the demo ships: a T5 from random weights, trained on more examples than the SLM gets.

    python -m examples.demo.generator.llm

Corpus, tokenizer, initial weights and checkpoints are written to `runs/demo-llm`. The trained LLM is rounded to
bfloat16 and written to `examples/demo/llm`. An interrupted run resumes where it stopped.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, T5ForConditionalGeneration, set_seed

from modeling_llm2slm.data.atomic import atomic_write
from modeling_llm2slm.training.recipe import load_recipe
from modeling_llm2slm.training.run import train

from .__main__ import write_corpus
from .corpus import splits
from .tokenizer import train_tokenizer


HERE = Path(__file__).parent
LLM = HERE.parent / "llm"
LLM_EXAMPLES = 48_000  # each is seen once
TOKENIZER_EXAMPLES = 30_000
VOCABULARY = 1000


def make_llm(folder: Path, shipped: Path = LLM) -> None:
    """
    Train the LLM and ship it.

    Args:
        folder: Folder for everything that is not shipped.
        shipped: Folder for the LLM, its tokenizer and the record of its training.
    """
    files = write_corpus(folder / "corpus", LLM_EXAMPLES)
    texts = [text for example in splits(LLM_EXAMPLES)["train"][:TOKENIZER_EXAMPLES] for text in example.values()]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    start, trained = folder / "start", folder / "trained"
    set_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.from_pretrained(HERE / "t5.json", decoder_start_token_id=tokenizer.pad_token_id, **special)
    with atomic_write(start) as temporary:
        T5ForConditionalGeneration(config).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    paths = {"model": str(start), "output_dir": str(trained)}
    data = {"train_data": str(files["train"]), "validation_data": str(files["validation"])}
    train(load_recipe(HERE / "llm.yaml", paths | data))
    ship(trained, shipped)


def ship(trained: Path, folder: Path) -> None:
    """Copy the trained LLM in bfloat16, which halves its size; it is loaded in float32."""
    model = T5ForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
    with atomic_write(folder) as temporary:
        model.save_pretrained(temporary)
        for name in ("tokenizer.json", "tokenizer_config.json", "training.json"):
            shutil.copy(trained / name, temporary / name)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo.generator.llm", description="Train the demo's LLM.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo-llm"), help="folder for what is not shipped")
    make_llm(parser.parse_args().output)


if __name__ == "__main__":
    main()
