"""
The Multi30k experiment, English to German: a T5 from scratch, a small GPT-2 behind it, and the same GPT-2 alone.

    python benchmarks/multi30k.py --data /path/to/data --runs runs/multi30k

One command for all stages: tokenizer, LLM, LLM-to-SLM and SLM alone on the references, the LLM's own answers to the
training prompts, LLM-to-SLM going on with these, and the scores of all on the test split. A finished stage is skipped,
a stopped one continues. All is trained on the training split and chosen on the validation split; the test split is
read once, at the end. All have the same tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.building import build
from modeling_llm2slm.data import load_pairs, train_tokenizer, write_aside, write_json
from modeling_llm2slm.evaluation import evaluate, time_answers
from modeling_llm2slm.text_to_text import TextToText
from modeling_llm2slm.training import load_recipe, train


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configuration" / "recipes"
VOCABULARY = 6000
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCABULARY,
        "d_model": 256,
        "d_ff": 1024,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "d_kv": 64,
        "dropout_rate": 0.15,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 256,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
    },
    # A small T5 that drafts for the LLM, a third of whose decoder it has.
    "draft": {
        "model_type": "t5",
        "vocab_size": VOCABULARY,
        "d_model": 256,
        "d_ff": 1024,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 4,
        "d_kv": 64,
        "dropout_rate": 0.1,
    },
}
ROWS = {
    "llm": "LLM",
    "slm": "SLM alone",
    "llm2slm": "LLM-to-SLM",
    "llm2slm-distilled": "LLM-to-SLM, distilled",
}
MAX_NEW_TOKENS = 64
TIMED_ANSWERS, TIMED_ROUNDS = 50, 5


def main() -> None:
    """Runs what has not been run yet."""
    arguments = _arguments()
    data, runs = Path(arguments.data) / "multi30k" / "en-de", Path(arguments.runs)
    if not data.is_dir():
        raise SystemExit(
            f"There is no folder {data}. Name the folder that holds multi30k with --data or LLM2SLM_DATA."
        )
    os.environ.update(LLM2SLM_DATA=arguments.data, LLM2SLM_RUNS=arguments.runs)
    torch.set_num_threads(arguments.threads)
    stages: dict[str, str | Callable[[], Any]] = {
        "tokenizer": lambda: _train_tokenizer(data),
        "llm-init": lambda: build(_config(runs, "t5"), llm_tokenizer=str(runs / "tokenizer"), seed=0),
        "llm": "multi30k_en-de_llm",
        "llm2slm-init": lambda: build(str(runs / "llm"), _config(runs, "gpt2"), seed=1),
        "llm2slm": "multi30k_en-de_slm",
        "slm-init": lambda: build(slm=_config(runs, "gpt2"), slm_tokenizer=str(runs / "tokenizer"), seed=1),
        "slm": "multi30k_en-de_slm",
        "distilled": lambda: LLMAnswers(data, runs),
        "llm2slm-distilled": "multi30k_en-de_slm_distilled",
        "draft-init": lambda: build(str(runs / "llm"), _config(runs, "draft"), seed=1),
        "draft": "multi30k_en-de_draft",  # for benchmarks/assisted.py
    }
    for name in arguments.only or stages:
        _run_stage(name, runs / name, stages[name])
    if not arguments.only:
        result = _compare(data, runs)
        write_json(arguments.output, result)
        _print(result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument(
        "--data", default=os.environ.get("LLM2SLM_DATA", "data"), help="the folder that holds multi30k"
    )
    parser.add_argument("--runs", default="runs/multi30k", help="the folder for checkpoints")
    parser.add_argument("--output", default=ROOT / "docs" / "results" / "multi30k-en-de.json", type=Path)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--only", nargs="*", help="run these stages and compare nothing")
    return parser.parse_args()


def _run_stage(name: str, folder: Path, stage: str | Callable[[], Any]) -> None:
    if any((folder / file).is_file() for file in ("config.json", "tokenizer.json", "train.jsonl")):
        print(f"{name}: done before")
    elif isinstance(stage, str):
        start = name.removesuffix("-distilled") if name.endswith("-distilled") else f"{name}-init"
        paths = {"model": f"${{LLM2SLM_RUNS}}/{start}", "output_dir": f"${{LLM2SLM_RUNS}}/{name}"}
        print(f"{name}: training")
        train(load_recipe(RECIPES / f"{stage}.yaml", paths))
    else:
        print(f"{name}: building")
        with write_aside(folder) as aside:
            stage().save_pretrained(aside)


def _config(runs: Path, name: str) -> str:
    path = runs / f"{name}.json"
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return str(path)


def _train_tokenizer(data: Path) -> Any:
    pairs = load_pairs(data / "train.jsonl.gz", "source", "target")
    return train_tokenizer([*pairs["prompt"], *pairs["answer"]], VOCABULARY)


class LLMAnswers:
    """The training prompts with the LLM's greedy answers in place of the references."""

    def __init__(self, data: Path, runs: Path) -> None:
        self.prompts = load_pairs(data / "train.jsonl.gz", "source", "target")["prompt"][:]
        llm = TextToText.from_pretrained(runs / "llm")
        self.answers = llm.generate(self.prompts, batch_size=128, max_new_tokens=MAX_NEW_TOKENS)

    def save_pretrained(self, folder: Path) -> None:
        """Writes them to a file of JSON lines."""
        folder.mkdir(parents=True, exist_ok=True)
        pairs = zip(self.prompts, self.answers, strict=True)
        lines = [json.dumps({"source": prompt, "target": answer}, ensure_ascii=False) for prompt, answer in pairs]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _compare(data: Path, runs: Path) -> dict[str, Any]:
    models = {name: TextToText.from_pretrained(runs / name) for name in ROWS}
    rows = {name: _score(model, data, runs / name) for name, model in models.items()}
    for name, speed in _time(models, data).items():
        rows[name]["speed"] = speed
    best = "llm2slm-distilled"
    bleu = {name: row["scores"]["bleu"] for name, row in rows.items()}
    ms = {name: row["speed"]["ms_per_answer"] for name, row in rows.items()}
    return {
        "data": "Multi30k en-de, test_2016_flickr, 1,000 pairs",
        "comparison": {
            "bleu of LLM-to-SLM, distilled, relative to the LLM": bleu[best] / bleu["llm"],
            "bleu of LLM-to-SLM relative to the LLM": bleu["llm2slm"] / bleu["llm"],
            "bleu of LLM-to-SLM above the SLM alone, both on references": bleu["llm2slm"] - bleu["slm"],
            "bleu of LLM-to-SLM, distilled, above the SLM alone": bleu[best] - bleu["slm"],
            "time per answer of LLM-to-SLM, distilled, relative to the LLM": ms[best] / ms["llm"],
        },
        "configs": CONFIGS,
        "rows": rows,
    }


def _score(model: TextToText, data: Path, folder: Path) -> dict[str, Any]:
    def scored(**options: Any) -> dict[str, Any]:
        options = {"max_new_tokens": MAX_NEW_TOKENS, "timed_answers": 0, "batch_size": 50, **options}
        return evaluate(model, data / "test_2016_flickr.jsonl.gz", "source", "target", **options)

    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    training["validation"] = [row for row in training.pop("log") if "eval_loss" in row]
    beams = scored(num_beams=4)
    return {**scored(), "scores_with_4_beams": beams["scores"], "training": training}


def _time(models: dict[str, TextToText], data: Path) -> dict[str, dict[str, Any]]:
    """Times the models in turns, so that whatever else the machine does meets all of them; medians over the rounds."""
    prompts = load_pairs(data / "test_2016_flickr.jsonl.gz", "source", "target", limit=TIMED_ANSWERS)["prompt"][:]
    rounds = [
        {name: time_answers(model, prompts, max_new_tokens=MAX_NEW_TOKENS) for name, model in models.items()}
        for _ in range(TIMED_ROUNDS)
    ]
    return {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]} for name in models
    }


def _print(result: dict[str, Any]) -> None:
    for name, row in result["rows"].items():
        speed = row["speed"]
        print(
            f"{ROWS[name]:22} BLEU {row['scores']['bleu']:5.2f}  (4 beams {row['scores_with_4_beams']['bleu']:5.2f})  "
            f"chrF {row['scores']['chrf']:5.2f}  {speed['ms_per_answer']:6.1f} ms an answer, "
            f"{speed['ms_per_token']:5.2f} ms a token, {speed['tokens_per_answer']:4.1f} tokens, "
            f"trained {row['training']['seconds'] / 60:.0f} min"
        )
    for name, value in result["comparison"].items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
