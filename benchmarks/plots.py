"""
Plots of the experiments, made from their committed results.

    python -m benchmarks.plots

`docs/plots/quality-against-time.svg` is the plot of the README; the others belong to the pages of the experiments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
PAIRS = {"en-de": "English to German", "en-fr": "English to French"}
FIRST = "the LLM's first token, then SLM alone"
FAMILIES = {"LLM-to-SLM": "#d1495b", "LLM": "#30638e", "SLM alone": "#6b7a8f", FIRST: "#3a7d44"}
HIGHLIGHTED = 9  # models in the plot of quality against time

# The name of each row of the experiment as a reader knows it. The first ones are in the plot of quality against time.
LABELS = {
    "llm": "LLM: T5, 15+15 layers",
    "llm-int8": "LLM, int8 (CTranslate2)",
    "t5": "T5 alone, 2+2 layers, on references",
    "t5-trained-distilled": "T5 alone, 2+2 layers, fine-tuned on LLM outputs",
    "t5-trained-add-distilled": "LLM-to-SLM, T5 with 2+2 layers, on LLM outputs",
    "t5-cut-add-distilled": "LLM-to-SLM, 2+2 LLM layers",
    "t5-cut-add-distilled-int8": "LLM-to-SLM, 2+2 LLM layers, int8 (OpenVINO)",
    "gpt2": "GPT-2 alone, 3 layers, on references",
    "gpt2-trained-add-distilled": "LLM-to-SLM, GPT-2 with 3 layers, on LLM outputs",
    "gpt2-trained-add-distilled-int8": "LLM-to-SLM, GPT-2 with 3 layers, int8 (OpenVINO)",
    "llm-shallow": "T5 alone, 3+3 layers, on references",
    "llm-cut": "LLM with 2 decoder layers, on LLM outputs",
    "t5-distilled": "T5 alone, 2+2 layers, on LLM outputs",
    "t5-add": "LLM-to-SLM, new T5, on references",
    "t5-replace": "LLM-to-SLM, new T5, fusion replace, on references",
    "t5-lora": "LLM-to-SLM, trained T5 with LoRA, on references",
    "t5-add-distilled": "LLM-to-SLM, new T5, on LLM outputs",
    "gpt2-add": "LLM-to-SLM, new GPT-2, on references",
    "gpt2-replace": "LLM-to-SLM, new GPT-2, fusion replace, on references",
    "gpt2-add-distilled": "LLM-to-SLM, new GPT-2, on LLM outputs",
    "half": "LLM-to-SLM, new T5, half the epochs",
    "half-projector-1": "half the epochs, projector with 1 layer",
    "half-projector-3": "half the epochs, projector with 3 layers",
    "half-llm-layer-8": "half the epochs, hidden states of LLM layer 8",
    "half-llm-trained": "half the epochs, LLM trained too",
    "half-narrow": "half the epochs, SLM of width 128",
    "half-shallow": "half the epochs, SLM with 1+1 layers",
}


def label_of(name: str) -> str:
    """Return the label of a row; a row with a seed is named `row-seed`."""
    row, _, seed = name.rpartition("-")
    if name in LABELS or not seed.isdigit():
        return LABELS.get(name, name)
    return f"{LABELS.get(row, row)}, seed {seed}"


def family_of(label: str) -> str:
    """Return the kind of model that a label names, a key of `FAMILIES`."""
    if label.startswith("LLM-to-SLM"):
        return "LLM-to-SLM"
    return "LLM" if label.startswith("LLM") else "SLM alone"


def plot_quality(pair: str, result: Mapping[str, Any], file: Path) -> None:
    """
    Plot BLEU against time per output: numbered points, with their labels in a list.

    Args:
        pair: The language pair.
        result: The pair's result, as `benchmarks.multi30k_report` writes it.
        file: The SVG to write.
    """
    measured = {name: row for name, row in result["rows"].items() if "speed" in row}
    names = [name for name in LABELS if name in measured] + [name for name in measured if name not in LABELS]
    points = sorted((measured[name]["speed"]["ms_per_output"], name) for name in names[:HIGHLIGHTED])
    with drawing(file) as axes:
        lines = []
        for number, (milliseconds, name) in enumerate(points, start=1):
            color = FAMILIES[family_of(label_of(name))]
            bleu = measured[name]["bleu_1"]
            axes.plot(milliseconds, bleu, "o", markersize=12, color=color, markeredgecolor="white")
            axes.annotate(
                str(number), (milliseconds, bleu), ha="center", va="center_baseline", color="white", fontsize=8
            )
            lines.append((f"{number}  {label_of(name)}", color))
        axes.set(
            xlabel="milliseconds per output (batch 1, one thread)",
            ylabel="BLEU (greedy, 1,000 test sentences)",
            title=f"Multi30k, {PAIRS.get(pair, pair)}: quality against time",
        )
        axes.set_xlim(0, None)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.05 * (high - low), high)
        for index, (text, color) in enumerate(reversed(lines)):
            axes.annotate(
                text, (0.4, 0.05), xycoords="axes fraction", xytext=(0, 15 * index), textcoords="offset points",
                color=color, fontsize=9,
            )  # fmt: skip


def plot_pretrained(result: Mapping[str, Any], file: Path) -> None:
    """
    Plot scores against the time of an output, as a part of the LLM's.

    Args:
        result: The result of a task, as `benchmarks.pretrained_report` writes it.
        file: The SVG to write.
    """
    trained = {name: result["rows"][row["settings"].get("then", name)] for name, row in result["rows"].items()}
    most = max(row["settings"]["prompts"] for row in trained.values())
    with drawing(file) as axes:
        for name, row in result["rows"].items():
            settings, test, share = row["settings"], row["test"]["all"], row["ms_per_output_by_llm"]
            kinds = {"behind": "LLM-to-SLM", "cut": "SLM alone", "first": FIRST}
            family = next((kinds[key] for key in kinds if key in settings), "LLM")
            color, prompts = FAMILIES[family], trained[name]["settings"]["prompts"]
            label = f"the LLM, tuned on {prompts:,} rows" if family == "LLM" else f"{family}, {prompts:,} prompts"
            error = [[abs(bound - test["score"])] for bound in test["interval"]]
            axes.errorbar(share, test["score"], error, fmt="o", markersize=9, color=color, capsize=3, label=name)
            offset, side = (-10, "right") if family in ("LLM", "LLM-to-SLM") else (10, "left")
            height = 0 if family == "LLM" else 7 if prompts == most else -7  # rows of one family are close
            axes.annotate(
                label, (share, test["score"]), xytext=(offset, height), textcoords="offset points", ha=side,
                va="center", color=color,
            )  # fmt: skip
        axes.set(
            xlabel="time of an output, as a part of the LLM's (batch 1)",
            ylabel="exact match, % (2,155 test prompts; 95 % intervals)",
            title="Instructions, behind Gemma 3 270M: quality against time",
        )
        axes.set_xlim(0, 1.1)
        axes.set_ylim(0, None)


def plot_training(pair: str, result: Mapping[str, Any], file: Path) -> None:
    """Plot BLEU on the validation split after each epoch. The arguments are those of [`plot_quality`]."""
    with drawing(file) as axes:
        for name, row in result["rows"].items():
            if "training" in row and name in list(LABELS)[: list(LABELS).index("half")]:
                values = row["training"]["validation_bleu"]
                style = {"linewidth": 2.5, "color": "black"} if name == "llm" else {"linewidth": 1.2}
                axes.plot(range(1, len(values) + 1), values, marker=".", label=label_of(name), **style)
        axes.set(xlabel="epoch", ylabel="BLEU (500 validation sentences)")
        axes.set_title(f"Multi30k, {PAIRS.get(pair, pair)}: training")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)


@contextmanager
def drawing(file: Path) -> Iterator[Any]:
    """Give axes to draw on, and write an SVG with text as text; equal plots give equal files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "llm2slm",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
        yield axes
        axes.grid(alpha=0.25)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "plots", help="folder of the plots")
    arguments = parser.parse_args()
    for name in ("multi30k-en-de", "multi30k-en-fr", "multi30k_short-en-de"):
        result = json.loads((arguments.results / f"{name}.json").read_text(encoding="utf-8"))
        pair = name.partition("-")[2]
        quality = "quality-against-time" if name == "multi30k-en-de" else name  # the README shows this one
        plot_quality(pair, result, arguments.output / f"{quality}.svg")
        plot_training(pair, result, arguments.output / f"{name}-training.svg")
    result = json.loads((arguments.results / "pretrained-instructions.json").read_text(encoding="utf-8"))
    plot_pretrained(result, arguments.output / "pretrained-instructions.svg")


if __name__ == "__main__":
    main()
