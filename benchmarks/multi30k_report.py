"""
What came out of the Multi30k experiment: BLEU with paired bootstrap intervals, times by turns, a table and a plot.

`python -m benchmarks.multi30k --report` calls this. It reads the answers that the experiment has left, times the
models that there are, names the rows that were not run, and writes for each language pair, by the names of the
experiment's file and the pair, `docs/results/multi30k-en-de.json` and plots. A pair that was not run keeps its files.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU

from benchmarks.multi30k import ROOT, Experiment, Job
from modeling_llm2slm.benchmark.plots import drawn
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.metrics import METRICS, score_and_sign, time_generations


OUTPUT = ROOT / "docs" / "results"
PLOTS = ROOT / "docs" / "plots"
RESAMPLES = 1000
ROUNDS, PROMPTS_ALONE, PROMPTS_IN_BATCHES, BATCH = 5, 30, 160, 32
# The 97.5th percentile, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def report(experiment: Experiment, folder: Path = OUTPUT, plots: Path = PLOTS) -> dict[str, dict[str, Any]]:
    """Scores, times, writes and prints what there is; returns it by language pair."""
    result: dict[str, dict[str, Any]] = {}
    for pair in experiment.settings["rows"]:
        jobs = [job for job in experiment.jobs if job.pair == pair and job.row is not None]
        done = [job for job in jobs if experiment.is_done(job)]
        if "llm" not in {job.name for job in done}:
            continue
        rows, counts = _score(experiment, pair, done)
        for name, times in _time(experiment, pair, [job for job in done if job.seed == 0]).items():
            rows[name] |= times
        result[pair] = found = {
            "experiment": {**experiment.settings, "rows": experiment.settings["rows"][pair]},
            "versions": versions(),
            "threads": 1,
            "rows": rows,
            "best": _best(done, rows, counts),
            "seeds": _seeds(done, rows),
            "not_run": [job.name for job in jobs if job not in done],
        }
        write_json(folder / f"{experiment.file.stem}-{pair}.json", found)
        print(table(pair, found), flush=True)
        plot(pair, found, plots / f"{experiment.file.stem}-{pair}.svg")
        plot_training(pair, found, plots / f"{experiment.file.stem}-{pair}-training.svg")
    if not result:
        raise SystemExit(f"No LLM is done in {experiment.runs}. Name the folder of the experiment with --runs.")
    return result


def _score(
    experiment: Experiment, pair: str, jobs: list[Job]
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """What is known of each row but its time, and what BLEU counts in its greedy answers."""
    references = load_examples(str(experiment.split(pair, "test")), "source", "target")["target"][:]
    rows: dict[str, dict[str, Any]] = {job.name: {} for job in jobs}
    for beams in ("4", "1"):
        counts = {}
        for job in jobs:
            answers = json.loads((experiment.runs / pair / job.name / "answers.json").read_text(encoding="utf-8"))
            scores, signatures = score_and_sign(answers[beams], references, METRICS if beams == "1" else ("bleu",))
            rows[job.name] |= {f"{name}_{beams}": value for name, value in scores.items()}
            rows[job.name].setdefault("signatures", {}).update(signatures)
            counts[job.name] = sentence_counts(answers[beams], references)
        for name, intervals in bootstrap(counts, "llm").items():
            rows[name] |= {f"{key}_{beams}": value for key, value in intervals.items()}
    for job in jobs:
        training = experiment.model(pair, job.name) / "training.json"
        if training.is_file():
            told = json.loads(training.read_text(encoding="utf-8"))
            validation = [entry["eval_bleu"] for entry in told.pop("log") if "eval_bleu" in entry]
            kept = ["steps", "best_metric", "parameters", "trained_parameters"]
            kept += ["seconds"] if told["resumed_at_step"] is None else []  # else they are those of its last part
            rows[job.name]["training"] = {"validation_bleu": validation, **{key: told[key] for key in kept}}
    return rows, counts


def sentence_counts(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What BLEU adds up of each sentence `(sentences, 10)`: matches and n-grams of 1 to 4 words, the two lengths."""
    metric, rows = BLEU(effective_order=True), []
    for answer, reference in zip(answers, references, strict=True):
        score = metric.sentence_score(answer, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows)


def bleu_of(counts: np.ndarray) -> float:
    """BLEU of a corpus, from the counts of its sentences."""
    matches, totals, (length, reference) = np.split(counts.sum(0), [4, 8])
    return BLEU.compute_bleu(
        list(map(int, matches)), list(map(int, totals)), int(length), int(reference), smooth_method="exp"
    ).score


def bootstrap(counts: dict[str, np.ndarray], baseline: str, samples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """
    Intervals of 95 % by paired bootstrap (Koehn, 2004): every system on the same resampled sentences.

    Args:
        counts: Of each system, what [`sentence_counts`] returns.
        baseline: The system to compare with.
        samples: How often to resample.

    Returns:
        Of each system `bleu_interval`, and `relative` and `relative_interval`: its BLEU by that of the baseline.
    """
    generator = np.random.default_rng(0)
    sentences = len(counts[baseline])
    draws = [generator.integers(sentences, size=sentences) for _ in range(samples)]
    found = {name: np.array([bleu_of(rows[draw]) for draw in draws]) for name, rows in counts.items()}
    own = {name: bleu_of(rows) for name, rows in counts.items()}
    return {
        name: {
            "bleu_interval": _middle(found[name]),
            "relative": own[name] / own[baseline],
            "relative_interval": _middle(found[name] / found[baseline]),
        }
        for name in counts
    }


def _best(jobs: list[Job], rows: dict[str, Any], counts: dict[str, np.ndarray]) -> dict[str, Any]:
    """
    Of LLM-to-SLM and of the SLM alone, the row with most BLEU on the validation split, and what lies between them; the
    same of the SLM alone as it comes from references, where the best one has the LLM's answers.
    """
    built = {job.name: job.row for job in jobs if job.seed == 0 and job.row and "build" in job.row}
    composites = [name for name, row in built.items() if {"llm", "slm"} <= row["build"].keys()]
    llms, name = set(), "llm"
    while name in built:  # the LLM, and what it was grown from
        llms.add(name)
        name = built[name]["build"].get("llm")
    alone = [name for name, row in built.items() if not {*row["build"].values(), name} & llms]
    if not composites or not alone:
        return {}

    def best_of(names: list[str]) -> str:
        return max(names, key=lambda name: rows[name]["training"]["best_metric"])

    best, other = best_of(composites), best_of(alone)
    found = {"llm_to_slm": best, "slm_alone": other, **difference(counts[best], counts[other])}
    on_references = [name for name in alone if "targets" not in built[name]]
    if on_references and (one := best_of(on_references)) != other:
        found["on_references"] = {"slm_alone": one, **difference(counts[best], counts[one])}
    return found


def difference(better: np.ndarray, other: np.ndarray, samples: int = RESAMPLES) -> dict[str, Any]:
    """BLEU of one system above that of another, and its interval by paired bootstrap; see [`bootstrap`]."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(other), size=len(other)) for _ in range(samples)]
    differences = np.array([bleu_of(better[draw]) - bleu_of(other[draw]) for draw in draws])
    return {"above": bleu_of(better) - bleu_of(other), "above_interval": _middle(differences)}


def _middle(values: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def _seeds(jobs: list[Job], rows: dict[str, Any]) -> dict[str, Any]:
    """Rows that were trained from several seeds: the mean, and the interval of 95 % by Student's t."""
    found: dict[str, Any] = {}
    for first in (job for job in jobs if job.seed == 0):
        values = [rows[job.name]["bleu_1"] for job in jobs if job.row is first.row]
        if len(values) > 1:
            half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
            mean = statistics.mean(values)
            relative = mean / rows["llm"]["bleu_1"]
            found[first.name] = {"bleu": values, "mean": mean, "plus_minus": half, "relative": relative}
    return found


def _time(experiment: Experiment, pair: str, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """
    Answers one at a time and in batches, the models by turns: `speed`, medians over the rounds, and `time_by_llm`, the
    median of what each round has for the model by what it has for the LLM. A round is short, so a processor that
    changes its pace does so for all.
    """
    prompts = load_examples(str(experiment.split(pair, "test")), "source", "target")["prompt"][:PROMPTS_IN_BATCHES]
    models = {job.name: experiment.load(pair, job.name, job.row or {}) for job in jobs}
    options = {"max_new_tokens": experiment.settings["max_new_tokens"]}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            alone = time_generations(model, prompts[:PROMPTS_ALONE], num_beams=1, **options)
            start = time.perf_counter()
            model.generate(prompts, BATCH, num_beams=1, **options)
            alone["ms_per_output_in_batches"] = 1000 * (time.perf_counter() - start) / len(prompts)
            rounds[name].append(alone)
    return {
        name: {
            "speed": {key: statistics.median(one[key] for one in times) for key in times[0]},
            "time_by_llm": statistics.median(
                one["ms_per_output"] / llm["ms_per_output"] for one, llm in zip(times, rounds["llm"], strict=True)
            ),
        }
        for name, times in rounds.items()
    }


def table(pair: str, result: dict[str, Any]) -> str:
    """The rows of a language pair as Markdown."""
    lines = [
        f"### {pair}",
        "",
        "| | BLEU | of the LLM's, % | 4 beams | ms per answer | of the LLM's | ms a token | tokens | ms in batches |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in result["rows"].items():
        low, high = (100 * bound for bound in row["relative_interval_1"])
        cells = [
            name, f"{row['bleu_1']:.1f}", f"{100 * row['relative_1']:.1f} ({low:.1f} to {high:.1f})",
            f"{row['bleu_4']:.1f}",
        ]  # fmt: skip
        if "speed" in row:
            speed = row["speed"]
            cells += [f"{speed['ms_per_output']:.1f}", f"{row['time_by_llm']:.2f}", f"{speed['ms_per_token']:.2f}"]
            cells += [f"{speed['tokens_per_answer']:.1f}", f"{speed['ms_per_output_in_batches']:.1f}"]
        lines.append(f"| {' | '.join(cells + [''] * (9 - len(cells)))} |")
    for name, seeds in result["seeds"].items():
        lines += ["", f"{name}, {len(seeds['bleu'])} seeds: {seeds['mean']:.2f} ± {seeds['plus_minus']:.2f}"]
        lines[-1] += f", {100 * seeds['relative']:.1f} % of the LLM's."
    if best := result["best"]:
        lines += ["", f"Best on the validation split: {best['llm_to_slm']}."]
        for kind, other in {"": best, " on references": best.get("on_references")}.items():
            if other:
                low, high = other["above_interval"]
                lines[-1] += f" Beside the best SLM alone{kind}, {other['slm_alone']}, it has"
                lines[-1] += f" {other['above']:+.1f} BLEU ({low:+.1f} to {high:+.1f})."
    if result["not_run"]:
        lines += ["", f"Not run: {', '.join(result['not_run'])}."]
    return "\n".join(lines)


def plot(pair: str, result: dict[str, Any], file: Path) -> None:
    """Quality against time per answer; the LLM and the SLMs alone as lines."""
    with drawn(file) as axes:
        for name, row in result["rows"].items():
            if "speed" not in row or name.startswith("half"):
                continue
            point = (row["speed"]["ms_per_output"], row["bleu_1"])
            line = {"llm": ("LLM", "C3"), "t5": ("small T5 alone", "C0"), "gpt2": ("GPT-2 alone", "C2")}.get(name)
            if line is not None:
                axes.axhline(point[1], linestyle="--", linewidth=0.8, color=line[1], label=line[0])
            axes.plot(*point, "o", color=line[1] if line else "C1")
            axes.annotate(name, point, textcoords="offset points", xytext=(6, 3), fontsize="small")
        axes.set(xlabel="ms per answer, one at a time, one thread", ylabel="BLEU, greedy", title=f"Multi30k {pair}")
        axes.set_xlim(0, None)


def plot_training(pair: str, result: dict[str, Any], file: Path) -> None:
    """BLEU on the validation split after each epoch."""
    with drawn(file) as axes:
        for name, row in result["rows"].items():
            if "training" in row and not name.startswith("half"):
                values = row["training"]["validation_bleu"]
                style = {"linewidth": 2, "color": "C3"} if name == "llm" else {"linewidth": 1}
                axes.plot(range(1, len(values) + 1), values, marker=".", label=name, **style)
        axes.set(xlabel="epoch", ylabel="BLEU, 500 validation sentences", title=f"Multi30k {pair}, training")
