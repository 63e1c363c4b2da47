"""
Report the Multi30k experiment: BLEU with intervals by paired bootstrap, times in turns, a table and plots.

`python -m benchmarks.multi30k --report` calls this. It reads the outputs of the experiment, times the models, names
the rows that were not run, and writes `docs/results/multi30k-en-de.json` (named after the experiment's file and the
language pair) and plots. The files of a pair that was not run stay as they are.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from sacrebleu.metrics import BLEU

from benchmarks.multi30k_experiment import ROOT, SOURCE, Experiment, Job
from benchmarks.plots import label_of, plot_quality, plot_training
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.metrics import score_with_signatures
from modeling_llm2slm.evaluation.timing import seconds_of, speed, time_in_turns, time_output
from modeling_llm2slm.settings import METRICS


OUTPUT = ROOT / "docs" / "results"
PLOTS = ROOT / "docs" / "plots"
RESAMPLES = 1000
ROUNDS, PROMPTS_ALONE, PROMPTS_IN_BATCHES, BATCH = 5, 30, 160, 32


def report(experiment: Experiment, folder: Path = OUTPUT, plots: Path = PLOTS) -> dict[str, dict[str, Any]]:
    """Score, time, write and print what is done; return it by language pair."""
    result: dict[str, dict[str, Any]] = {}
    for pair in experiment.settings["rows"]:
        jobs = [job for job in experiment.jobs if job.pair == pair and job.row is not None]
        done = [job for job in jobs if experiment.is_done(job)]
        if "llm" not in {job.name for job in done}:
            continue
        rows, counts = _score(experiment, pair, done)
        for name, times in _time(experiment, pair, [job for job in done if job.seed == 0]).items():
            rows[name] |= times
        result[pair] = {
            "experiment": {**experiment.settings, "rows": experiment.settings["rows"][pair]},
            "versions": versions(),
            "threads": 1,
            "rows": rows,
            "best": _best(done, rows, counts),
            "seeds": _seeds(done, rows),
            "not_run": [job.name for job in jobs if job not in done],
        }
        name = f"{experiment.file.stem}-{pair}"
        write_json(folder / f"{name}.json", result[pair])
        print(table(pair, result[pair]), flush=True)
        plot_quality(pair, result[pair], plots / f"{name}.svg")
        plot_training(pair, result[pair], plots / f"{name}-training.svg")
    if not result:
        raise SystemExit(f"No LLM is done in {experiment.runs}. Name the folder of the experiment with --runs.")
    return result


def _score(
    experiment: Experiment, pair: str, jobs: list[Job]
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Return everything about each row except its times, and the BLEU counts of its greedy outputs."""
    references = load_examples(str(experiment.split(pair, "test")), SOURCE)["target"][:]
    rows: dict[str, dict[str, Any]] = {job.name: {} for job in jobs}
    for beams in ("4", "1"):
        counts = {}
        for job in jobs:
            outputs = json.loads((experiment.runs / pair / job.name / "outputs.json").read_text(encoding="utf-8"))
            metrics = tuple(METRICS) if beams == "1" else ("bleu",)
            scores, signatures = score_with_signatures(outputs[beams], references, metrics)
            rows[job.name] |= {f"{name}_{beams}": value for name, value in scores.items()}
            rows[job.name].setdefault("signatures", {}).update(signatures)
            counts[job.name] = sentence_counts(outputs[beams], references)
        for name, intervals in bleu_intervals(counts, "llm").items():
            rows[name] |= {f"{key}_{beams}": value for key, value in intervals.items()}
    for job in jobs:
        training = experiment.model(pair, job.name) / "training.json"
        if training.is_file():
            rows[job.name]["training"] = _training(json.loads(training.read_text(encoding="utf-8")))
    return rows, counts


def _training(record: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a training's record that is reported."""
    validation = [entry["eval_bleu"] for entry in record["log"] if "eval_bleu" in entry]
    kept = ["steps", "best_metric", "parameters", "trained_parameters"]
    if record["resumed_at_step"] is None:  # otherwise the seconds are those of the last part only
        kept.append("seconds")
    return {"validation_bleu": validation, **{key: record[key] for key in kept}}


def sentence_counts(outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the counts of each sentence that BLEU sums `(sentences, 10)`: matches, n-grams (1 to 4), two lengths."""
    metric, rows = BLEU(effective_order=True), []
    for output, reference in zip(outputs, references, strict=True):
        score = metric.sentence_score(output, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows)


def bleu_of(counts: np.ndarray) -> float:
    """Return the BLEU of a corpus from the counts of its sentences."""
    matches, totals, (length, reference) = np.split(counts.sum(0), [4, 8])
    return BLEU.compute_bleu(
        list(map(int, matches)), list(map(int, totals)), int(length), int(reference), smooth_method="exp"
    ).score


def _bleu_of_rows(own: np.ndarray, chosen: np.ndarray) -> float:
    return bleu_of(own[chosen])


def _relative_bleu(own: np.ndarray, baseline: np.ndarray, chosen: np.ndarray) -> float:
    return bleu_of(own[chosen]) / bleu_of(baseline[chosen])


def interval(statistic: Callable[[np.ndarray], float], sentences: int, samples: int = RESAMPLES) -> list[float]:
    """
    Return the 95 % interval of a statistic of sentence numbers, by bootstrap.

    Every call resamples the same sentences, so statistics of several systems are paired (Koehn, 2004). sacrebleu's
    `PairedTest` does the same, but gives no intervals for ratios and differences.
    """
    result = scipy.stats.bootstrap(
        (np.arange(sentences),), statistic, vectorized=False, n_resamples=samples, method="percentile", rng=0
    )
    return [float(bound) for bound in result.confidence_interval]


def bleu_intervals(
    counts: dict[str, np.ndarray], baseline: str, samples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """
    Compare the BLEU of each system with that of a baseline, see [`interval`].

    Args:
        counts: [`sentence_counts`] of each system.
        baseline: Name of the system to compare with.
        samples: Number of resamples.

    Returns:
        For each system, `bleu_interval`, `relative` (its BLEU divided by the baseline's) and `relative_interval`.
    """
    reference, sentences = counts[baseline], len(counts[baseline])
    return {
        name: {
            "bleu_interval": interval(partial(_bleu_of_rows, own), sentences, samples),
            "relative": bleu_of(own) / bleu_of(reference),
            "relative_interval": interval(partial(_relative_bleu, own, reference), sentences, samples),
        }
        for name, own in counts.items()
    }


def difference(better: np.ndarray, other: np.ndarray, samples: int = RESAMPLES) -> dict[str, Any]:
    """Return the BLEU of one system minus that of another (`above`), and its interval, see [`interval`]."""
    return {
        "above": bleu_of(better) - bleu_of(other),
        "above_interval": interval(
            lambda chosen: bleu_of(better[chosen]) - bleu_of(other[chosen]), len(other), samples
        ),
    }


def _best(jobs: list[Job], rows: dict[str, Any], counts: dict[str, np.ndarray]) -> dict[str, Any]:
    """
    Return the LLM-to-SLM row and the SLM-alone row with the highest validation BLEU, and the difference of their test
    BLEU. If the best SLM alone is trained on the LLM's outputs, add the best one that is trained on references.
    """
    built = {job.name: job.row for job in jobs if job.seed == 0 and job.row and "build" in job.row}
    composites = [name for name, row in built.items() if {"llm", "slm"} <= row["build"].keys()]
    llms, name = set(), "llm"
    while name in built:  # the LLM, and the models that it was grown from
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


def _seeds(jobs: list[Job], rows: dict[str, Any]) -> dict[str, Any]:
    """Return, for rows with several seeds, the mean BLEU and the half-width of its 95 % interval by Student's t."""
    found: dict[str, Any] = {}
    for first in (job for job in jobs if job.seed == 0):
        values = [rows[job.name]["bleu_1"] for job in jobs if job.row is first.row]
        if len(values) > 1:
            half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
            mean = statistics.mean(values)
            relative = mean / rows["llm"]["bleu_1"]
            found[first.name] = {"bleu": values, "mean": mean, "plus_minus": float(half), "relative": relative}
    return found


def _time(experiment: Experiment, pair: str, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """
    Time outputs one at a time and in batches, the models in turns.

    Returns:
        For each row, `speed` (medians over the rounds) and `time_by_llm`: the median over the rounds of its time per
        output divided by the LLM's. A change of the processor's pace meets all models of a round.
    """
    prompts = load_examples(str(experiment.split(pair, "test")), SOURCE)["prompt"][:PROMPTS_IN_BATCHES]
    options = {"num_beams": 1, "max_new_tokens": experiment.settings["max_new_tokens"]}

    def time_round(model: Any, _: int) -> dict[str, float]:
        alone = time_in_turns({"model": partial(time_output, model, **options)}, prompts[:PROMPTS_ALONE])["model"]
        batched = seconds_of(lambda: model.generate(prompts, BATCH, **options))
        return {**speed(alone), "ms_per_output_in_batches": 1000 * batched / len(prompts)}

    models = {job.name: partial(time_round, experiment.load(pair, job.name, job.row or {})) for job in jobs}
    rounds = time_in_turns(models, range(ROUNDS))
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
    """Return the rows of a language pair as a Markdown table."""
    lines = [
        f"### {pair}",
        "",
        "| model | BLEU | % of the LLM | BLEU, 4 beams | ms per output | time, of the LLM | ms per token "
        "| tokens per output | ms per output in batches |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in result["rows"].items():
        low, high = (100 * bound for bound in row["relative_interval_1"])
        cells = [
            f"{label_of(name)} (`{name}`)", f"{row['bleu_1']:.1f}",
            f"{100 * row['relative_1']:.1f} ({low:.1f} to {high:.1f})", f"{row['bleu_4']:.1f}",
        ]  # fmt: skip
        if "speed" in row:
            times = row["speed"]
            cells += [f"{times['ms_per_output']:.1f}", f"{row['time_by_llm']:.2f}", f"{times['ms_per_token']:.2f}"]
            cells += [f"{times['tokens_per_output']:.1f}", f"{times['ms_per_output_in_batches']:.1f}"]
        lines.append(f"| {' | '.join(cells + [''] * (9 - len(cells)))} |")
    for name, seeds in result["seeds"].items():
        lines += ["", f"{label_of(name)}, {len(seeds['bleu'])} seeds: {seeds['mean']:.2f} ± {seeds['plus_minus']:.2f}"]
        lines[-1] += f", {100 * seeds['relative']:.1f} % of the LLM."
    lines += _sentences(result)
    return "\n".join(lines)


def _sentences(result: dict[str, Any]) -> list[str]:
    """Return what is printed below the table."""
    lines: list[str] = []
    if best := result["best"]:
        lines += ["", f"Highest validation BLEU: {label_of(best['llm_to_slm'])}."]
        for kind, other in {"": best, ", on references": best.get("on_references")}.items():
            if other:
                low, high = other["above_interval"]
                lines[-1] += f" Compared with the best SLM alone{kind} ({label_of(other['slm_alone'])}), it has"
                lines[-1] += f" {other['above']:+.1f} BLEU ({low:+.1f} to {high:+.1f})."
    if result["not_run"]:
        lines += ["", f"Not run: {', '.join(result['not_run'])}."]
    return lines
