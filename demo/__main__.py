"""The demonstration: a small model, guided by a frozen large one, learns to translate and then translates.

    python -m demo
    python -m demo "The old woman gives the hungry dog a sausage."

Needs no network. Everything is written to `runs/demo`; a run that was stopped continues where it was, and what is
trained already is not trained again.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import: nothing here is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor, logging

from demo import corpus
from demo.llm import BATCH, LLM, LLM_PAIRS, RECIPES
from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.data.files import atomic_write
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.metrics import score
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.training.training import load_recipe, train


SLM_PAIRS = 16_000
TIMED = 30  # test sentences whose answers are timed
SHOWN = 5  # test sentences that are translated for the reader
MAX_NEW_TOKENS = 64

console = Console()


def train_once(name: str, llm: Path | None, folder: Path, data: dict[str, str]) -> Path:
    """
    Trains the SLM by the recipe of that name, unless that is done already.

    Args:
        name: Of the recipe and of the model's folder.
        llm: The LLM to train it with, or None to train it alone.
        folder: The folder of the demonstration.
        data: The file of each split.

    Returns:
        The folder of the trained model.
    """
    start, trained = folder / "start" / name, folder / name
    if (trained / "training.json").exists():
        console.print(f"{trained} is trained already; remove it to train it anew.")
        return trained
    slm = str(RECIPES / "gpt2.json")
    with atomic_write(start) as aside:
        if llm is None:
            build(slm=slm, slm_tokenizer=str(LLM)).save_pretrained(aside)
        else:
            # An answer begins as the LLM's does, so that this model can draft for it (`as_assistant_of`).
            start_id = AutoConfig.from_pretrained(llm).decoder_start_token_id
            options = {"encoder_dtype": "float32", "decoder_start_token_id": start_id}
            build(str(llm), slm, fusion="add", **options).save_pretrained(aside)
    paths = {"model": str(start), "output_dir": str(trained)}
    files = {"train_data": data["train"], "validation_data": data["validation"]}
    train(load_recipe(RECIPES / "slm.yaml", paths | files))
    return trained


def seconds_per_output(models: dict[str, TextToText], prompts: Sequence[str], rounds: int = 3) -> dict[str, float]:
    """
    Mean time of an answer, one prompt at a time, from text to text.

    The models take turns on every prompt and the best of some rounds counts, so that what else runs on the machine
    favours none of them.
    """
    best: dict[str, list[float]] = {name: [math.inf] * len(prompts) for name in models}
    for _ in range(rounds):
        for index, prompt in enumerate(prompts):
            for name, model in models.items():
                start = time.perf_counter()
                model.generate([prompt], max_new_tokens=MAX_NEW_TOKENS)
                best[name][index] = min(best[name][index], time.perf_counter() - start)
    return {name: sum(times) / len(times) for name, times in best.items()}


def measure(models: dict[str, TextToText], test: str) -> dict[str, dict[str, float]]:
    """BLEU on the test split, time per answer and parameters of each model."""
    pairs = load_examples(test)
    prompts, references = pairs["prompt"][:], pairs["target"][:]
    rows: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        with console.status(f"{name} translates {len(prompts)} test sentences"):
            answers = model.generate(prompts, batch_size=100, max_new_tokens=MAX_NEW_TOKENS)
        rows[name] = {"bleu": score(answers, references, ["bleu"])["bleu"]}
    with console.status(f"Timing {TIMED} answers"):
        seconds = seconds_per_output(models, prompts[:TIMED])
    for name, model in models.items():
        rows[name]["ms_per_output"] = 1000 * seconds[name]
        rows[name]["parameters_that_decode"] = parameters_that_decode(model)
        rows[name]["parameters"] = model.model.num_parameters()
    return rows


def parameters_that_decode(text_to_text: TextToText) -> int:
    """Parameters that every token of the answer passes through."""
    model = text_to_text.model
    if model.config.model_type == "llm2slm":
        return model.decoder.num_parameters()
    return model.get_decoder().num_parameters() if model.config.is_encoder_decoder else model.num_parameters()


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints the table."""
    table = Table(title="English to German, test split of the embedded corpus, greedy decoding")
    table.add_column("")
    for heading in ("BLEU", "ms per answer", "speed-up", "parameters that decode", "parameters in all"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        speed_up = rows["LLM"]["ms_per_output"] / row["ms_per_output"]
        sizes = [f"{row[column] / 1e6:.2f}M" for column in ("parameters_that_decode", "parameters")]
        table.add_row(name, f"{row['bleu']:.1f}", f"{row['ms_per_output']:.0f}", f"{speed_up:.1f}x", *sizes)
    console.print(table)
    console.print(
        f"The LLM came trained, on {LLM_PAIRS:,} pairs; the SLM, alone and with the LLM, saw the first {SLM_PAIRS:,} "
        "of them. All three share one tokenizer."
    )


def translate(folder: Path, sentences: Sequence[str], references: Sequence[str | None]) -> None:
    """Loads the saved model as anybody would, and translates."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    console.print(f"\nLoaded from {folder} with AutoModelForSeq2SeqLM and AutoProcessor:", highlight=False)
    for sentence, reference in zip(sentences, references, strict=True):
        inputs = processor(text=[sentence], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        answer = processor.batch_decode(tokens, skip_special_tokens=True)[0]
        lines = [("English", sentence, "dim"), ("LLM-to-SLM", answer, "bold")]
        if reference is not None and reference != answer:
            lines.append(("reference", reference, "dim"))
        console.print()
        for label, text, style in lines:
            console.print(f"  {label:10}  {text}", style=style, highlight=False, markup=False)


def save_results(file: Path, rows: dict[str, dict[str, float]], trained: Sequence[Path]) -> None:
    """Writes the table with what it depends on to a JSON file."""
    seconds = {path.name: json.loads((path / "training.json").read_text())["seconds"] for path in trained}
    report: dict[str, Any] = {
        "rows": rows,
        "training_pairs": {"LLM": LLM_PAIRS, "SLM": SLM_PAIRS},
        "training_seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(file, report)


def main() -> None:
    """Reads the command line and goes through the demonstration."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sentences", nargs="*", help="sentences of your own, made of words that the corpus has")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for all that is written")
    parser.add_argument("--results", type=Path, help="write the table to this JSON file as well")
    options = parser.parse_args()
    logging.set_verbosity_error()
    own = options.sentences
    if own and (options.output / "llm2slm" / "training.json").exists():
        translate(options.output / "llm2slm", own, [None] * len(own))
        return

    data = corpus.write_splits(options.output / "corpus", corpus.splits(SLM_PAIRS), BATCH)
    console.rule("The SLM learns to translate, guided by the frozen LLM")
    llm2slm = train_once("llm2slm", LLM, options.output, data)
    console.rule("The same SLM learns to translate alone, from the same pairs")
    slm = train_once("slm", None, options.output, data)

    paths = {"LLM": LLM, "SLM alone": slm, "LLM-to-SLM": llm2slm}
    rows = measure({name: TextToText.from_pretrained(path) for name, path in paths.items()}, data["test"])
    show(rows)
    if options.results:
        save_results(options.results, rows, [llm2slm, slm])
    test = load_examples(data["test"], limit=SHOWN)
    translate(llm2slm, own or test["prompt"][:], [None] * len(own) if own else test["target"][:])
    if not own:
        console.print('\nNow a sentence of yours: python -m demo "The old woman gives the hungry dog a sausage."')


if __name__ == "__main__":
    main()
