"""
Train a small language model behind a frozen LLM, compare it with both of them, and translate.

    python -m examples.demo
    python -m examples.demo "The old woman gives the hungry dog a sausage."

The demo downloads nothing and writes to `runs/demo`. An interrupted run resumes where it stopped.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from examples.demo import DATA, LLM
from examples.demo.training import quieten, train_side_by_side
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.metrics import score
from modeling_llm2slm.evaluation.timing import speed, time_in_turns, time_output
from modeling_llm2slm.inference.text_to_text import TextToText


MAX_NEW_TOKENS = 64
TIMED, ROUNDS = 30, 3  # test sentences, and how often each is timed
SHOWN = 3  # test sentences
SHORT = 8  # words: shown sentences are at most this long
REPORT_EVERY = 15  # seconds
OUTPUT = Path("runs/demo")

console = Console(highlight=False)


def main() -> None:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").split("\n")[1])
    parser.add_argument("sentences", nargs="*", help="sentences to translate, of words that the corpus has")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to")
    parser.add_argument("--results", type=Path, help="also write the table to this JSON file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each model (default: 1)")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(options.threads)
    trained = options.output / "llm2slm"
    if not (options.sentences and (trained / "training.json").exists()):
        compare(options.output, options.threads, options.results)
    if options.sentences:
        translate(trained, options.sentences)


def compare(output: Path, threads: int, results: Path | None = None) -> None:
    """Train the SLM with and without the LLM, and compare quality and speed."""
    start = time.monotonic()
    console.print(
        "The demo trains two small models at once: about 5 minutes on two free CPU cores, 8 on a busy machine."
    )
    models = train_models(output, threads)
    rows = measure({name: TextToText.from_pretrained(path) for name, path in models.items()})
    show(rows)
    minutes = (time.monotonic() - start) / 60
    if results:
        save(results, rows, models, minutes)
    short = [example for example in load_examples(DATA["test"]) if is_short(example["prompt"])][:SHOWN]
    short_matches, matches = (rows["LLM-to-SLM"][name] for name in ("exact_match_if_short", "exact_match"))
    console.print(
        f"\nThe first {SHOWN} test sentences of at most {SHORT} words, translated by LLM-to-SLM. Its translations "
        f"equal the reference for {short_matches:.0f} % of sentences this short, and for {matches:.0f} % of all."
    )
    translate(models["LLM-to-SLM"], [one["prompt"] for one in short], [one["target"] for one in short])
    command = [sys.executable.removeprefix(f"{Path.cwd()}/"), "-m", "examples.demo"]
    command += ["--output", str(output)] if output != OUTPUT else []
    console.print(f"\nThis run took {minutes:.1f} minutes. Translate a sentence of your own:\n")
    console.print(f'    {shlex.join(command)} "The old woman gives the hungry dog a sausage."', soft_wrap=True)
    page = ["llm2slm", "serve", str(models["LLM-to-SLM"]), "--playground", "--examples", DATA["test"]]
    page[-1] = os.path.relpath(page[-1])
    console.print(
        "\nWatch LLM and LLM-to-SLM side by side in a browser. `make playground` installs what this needs:\n"
    )
    console.print(f"    {shlex.join(page)}", soft_wrap=True)


def train_models(output: Path, threads: int) -> dict[str, Path]:
    """Train the models that `output` does not hold yet. Return the folder of each model by its name."""
    folders = {"SLM alone": output / "slm", "LLM-to-SLM": output / "llm2slm"}
    untrained = {name: folder for name, folder in folders.items() if not (folder / "training.json").exists()}
    if untrained:
        examples = len(load_examples(DATA["train"]))
        with stage(f"Training on {examples:,} examples: {' and '.join(untrained)}"):
            train_side_by_side(untrained, threads)
    else:
        console.print(f"Both models are already trained. Remove {output} to train them again.")
    return {"LLM": LLM, **folders}


def measure(models: dict[str, TextToText]) -> dict[str, dict[str, Any]]:
    """Return the scores on the test split, the time per output and the parameters of each model."""
    test = load_examples(DATA["test"])
    prompts, references = test["prompt"][:], test["target"][:]
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        outputs: list[str] = []
        with stage(f"{name} translates {len(prompts):,} test sentences") as report:
            for first in range(0, len(prompts), 250):
                batch = prompts[first : first + 250]
                outputs += model.generate(batch, batch_size=125, max_new_tokens=MAX_NEW_TOKENS)
                report(len(outputs), len(prompts))
        short = [place for place, prompt in enumerate(prompts) if is_short(prompt)]
        exact = score([outputs[place] for place in short], [references[place] for place in short], ["exact_match"])
        rows[name] = {
            **score(outputs, references, ["bleu", "exact_match"]),
            "exact_match_if_short": exact["exact_match"],
            "parameters": model.parameters(),
        }
    contestants = {name: partial(time_output, model, max_new_tokens=MAX_NEW_TOKENS) for name, model in models.items()}
    rounds = prompts[:TIMED] * ROUNDS
    with stage(f"The models take turns to translate {TIMED} sentences, one at a time, {ROUNDS} times") as report:
        timings = time_in_turns(contestants, rounds, progress=lambda number, name: report(number, len(rounds)))
    for name, row in rows.items():
        # The fastest round of each sentence, so that other load on the machine counts as little as possible.
        best = [min(timings[name][place::TIMED], key=lambda timing: timing.total) for place in range(TIMED)]
        row["ms_per_output"] = speed(best)["ms_per_output"]
    return rows


def is_short(sentence: str) -> bool:
    """Return whether a sentence has at most `SHORT` words."""
    return len(sentence.split()) <= SHORT


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table of quality and speed."""
    table = Table(title="English to German, test split, greedy decoding, one sentence at a time")
    table.add_column("")
    for heading in ("BLEU", "exact match", "ms per output", "speed-up", "parameters that decode"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        speed_up = rows["LLM"]["ms_per_output"] / row["ms_per_output"]
        quality = [f"{row['bleu']:.1f}", f"{row['exact_match']:.0f} %"]
        cost = [f"{row['ms_per_output']:.0f}", f"{speed_up:.1f}x", f"{row['parameters']['decode'] / 1e6:.2f}M"]
        table.add_row(name, *quality, *cost)
    console.print(table)
    console.print(
        "The LLM was trained on 48,000 examples, and both SLMs on the first 16,000 of them. Several translations are "
        "often right and the reference is only one of them, so no model can equal it every time."
    )


def save(file: Path, rows: dict[str, dict[str, Any]], models: dict[str, Path], minutes: float) -> None:
    """Write the table and what it depends on to a JSON file."""
    records = {name: json.loads((path / "training.json").read_text()) for name, path in models.items()}
    report = {
        "rows": rows,
        "training_examples": {"LLM": 48_000, "SLM alone": 16_000, "LLM-to-SLM": 16_000},
        "training_seconds": {name: record["seconds"] for name, record in records.items()},
        "minutes": round(minutes, 1),
        "cpu_minutes": round(sum(os.times()[:4]) / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(file, report)


def translate(folder: Path, sentences: Sequence[str], references: Sequence[str | None] = ()) -> None:
    """Load a saved model with the Auto classes, as any transformers model, and print its translations."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for number, sentence in enumerate(sentences):
        tokens = model.generate(**processor(text=[sentence], return_tensors="pt"), max_new_tokens=MAX_NEW_TOKENS)
        lines = {"English": sentence, "LLM-to-SLM": processor.batch_decode(tokens, skip_special_tokens=True)[0]}
        if references:
            lines["reference"] = str(references[number])
        console.print()
        for label, text in lines.items():
            console.print(f"  {label:10}  {text}", style="bold" if label == "LLM-to-SLM" else "dim", markup=False)


@contextmanager
def stage(title: str) -> Iterator[Callable[[int, int], None]]:
    """Print what is being done and how long it took; the yielded function reports progress at times."""
    start = reported = time.monotonic()
    console.print(f"{title} ...")

    def report(done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= REPORT_EVERY:
            reported = time.monotonic()
            console.print(f"  {done:,} of {total:,}")

    yield report
    console.print(f"  done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
