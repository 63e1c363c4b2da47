"""
Report the experiment behind a pretrained LLM: scores with intervals by paired bootstrap, times in turns, a table.

`python -m benchmarks.pretrained --report` calls this. It reads the outputs of the rows that are done, times their
models and writes `docs/results/pretrained-<task>-<name>.json`. Each model is timed in PyTorch and, exported once to a
folder next to it, in other engines; outputs of quantized exports are scored on a part of the test split.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from benchmarks.first_token import FirstToken
from benchmarks.multi30k_report import bleu_of, interval, sentence_counts
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.timing import seconds_of, speed, time_in_turns, time_output
from modeling_llm2slm.inference.text_to_text import TextToText


OUTPUT = Path(__file__).parents[1] / "docs" / "results"
ROUNDS, PROMPTS_ALONE, PROMPTS_IN_BATCHES, BATCH = 3, 20, 64, 32
LOOKED_UP = 4  # tokens in a draft that the LLM looks up in the prompt
ENGINES = ("openvino-fp32", "openvino-int8")  # besides PyTorch in float32
SCORED, SCORED_EXAMPLES = ("openvino-int8", "onnx-int8", "llamacpp-int8"), 500
SETS = ("taxonomy_animal",)  # tasks whose references list things in no fixed order


def report(
    experiment: Any,
    folder: Path = OUTPUT,
    only: Sequence[str] | None = None,
    engines: Sequence[str] = ENGINES,
    drafts: bool = True,
    report_name: str = "",
) -> None:
    """
    Score, time, write and print the rows that are done, or `only` some of them, in PyTorch and `engines`, as a report
    of a name of its own.
    """
    for task, rows in experiment.settings["rows"].items():
        done = [name for name in rows if (experiment.folder(task, name) / "outputs.json").is_file()]
        done = [name for name in done if only is None or name in only]
        if not done:
            continue
        result: dict[str, Any] = {"task": experiment.settings["tasks"][task], "versions": versions(), "rows": {}}
        for name in done:
            trained = experiment.model(task, rows[name].get("then", name))
            result["rows"][name] = {"settings": rows[name], **_training(trained)}
        for split in ("validation", "test"):
            for name, scores in scores_of(experiment, task, done, split).items():
                result["rows"][name][split] = scores
        for name, times in _time(experiment, task, done, ("pytorch", *engines)).items():
            result["rows"][name] |= times.pop("pytorch")
            result["rows"][name]["engines"] = times
        for name in done:
            for engine in set(SCORED) & result["rows"][name]["engines"].keys():
                scores = _engine_scores(experiment, task, name, engine)
                result["rows"][name]["engines"][engine]["test_part"] = scores
        result["gains"] = gains(experiment, task, done)
        result["drafts"] = _draft(experiment, task, done) if drafts else {}
        result["not_run"] = [name for name in rows if name not in done]
        write_json(folder / f"pretrained-{'-'.join(filter(None, (task, report_name)))}.json", result)
        print(table(task, result), flush=True)


def _training(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    metric = f"eval_{record['metric']}"
    kept = {key: record[key] for key in ("parameters", "trained_parameters", "steps", "seconds", "threads")}
    return {**kept, "by_epoch": [entry[metric] for entry in record["log"] if metric in entry]}


def scores_of(experiment: Any, task: str, names: list[str], split: str) -> dict[str, dict[str, Any]]:
    """Return the scores of each row on a split, with 95 % intervals, and compared with those of its LLM."""
    examples = experiment.examples(task, split)
    counts = {}
    for name in names:
        outputs = _outputs(experiment, task, name)[split]
        counts[name] = _counts(experiment.settings["tasks"][task]["metric"], outputs, examples)
    tokenizer = AutoTokenizer.from_pretrained(experiment.runs / "vocabulary")
    long = [len(tokenizer(row["target"], add_special_tokens=False).input_ids) > 1 for row in examples]
    subsets = {"all": np.arange(len(examples)), "several_tokens": np.flatnonzero(long)}
    kinds = np.array([row["task"] for row in examples])
    scores = {}
    for name, own in counts.items():
        llm = _llm_of(experiment.row(task, name), name)
        scores[name] = {key: _compared(own[chosen], counts[llm][chosen]) for key, chosen in subsets.items()}
        scores[name]["by_task"] = {kind: _score(own[kinds == kind]) for kind in sorted(set(kinds))}
    return scores


def gains(experiment: Any, task: str, names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Return what each row gains on the test split, with a 95 % interval, over each row before it in `names` that
    learned from the same LLM's outputs for as many prompts.
    """
    metric, examples = experiment.settings["tasks"][task]["metric"], experiment.examples(task, "test")
    trained = {name: experiment.row(task, experiment.row(task, name).get("then", name)) for name in names}
    taught = {name: (row.get("outputs_of"), row["prompts"]) for name, row in trained.items()}
    counts = {name: _counts(metric, _outputs(experiment, task, name)["test"], examples) for name in names}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for number, name in enumerate(names):
        for other in names[:number]:
            if taught[name] == taught[other] and taught[name][0]:
                own, before = counts[name], counts[other]

                def gain(chosen: Any, own: Any = own, before: Any = before) -> float:
                    return _score(own[chosen]) - _score(before[chosen])

                score, bounds = gain(np.arange(len(own))), interval(gain, len(own))
                found.setdefault(name, {})[other] = {"score": score, "interval": bounds}
    return found


def _outputs(experiment: Any, task: str, name: str, engine: str = "") -> dict[str, list[str]]:
    file = _outputs_file(experiment, task, name, engine)
    outputs: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return outputs


def _outputs_file(experiment: Any, task: str, name: str, engine: str) -> Path:
    folder: Path = experiment.folder(task, name)
    return folder / f"outputs{engine and '-'}{engine}.json"


def _engine_scores(experiment: Any, task: str, name: str, engine: str) -> dict[str, Any]:
    """
    Generate with a quantized export for a part of the test split, evenly spread, and return the score there, the
    score of the row's outputs in PyTorch, and the part of outputs that are equal.
    """
    settings, examples = experiment.settings["tasks"][task], experiment.examples(task, "test")
    step = max(len(examples) // SCORED_EXAMPLES, 1)
    part = examples[::step]
    file = _outputs_file(experiment, task, name, engine)
    if not file.is_file():
        _say(f"{task}/{name}: generating with {engine}")
        options = {"max_new_tokens": settings["max_new_tokens"], "do_sample": False}
        model = load_row(experiment, task, name, engine)
        write_json(file, {"test": model.generate([row["prompt"] for row in part], 64, **options)})
    outputs = _outputs(experiment, task, name, engine)["test"]
    before = _outputs(experiment, task, name)["test"][::step]
    score, score_before = (_score(_counts(settings["metric"], texts, part)) for texts in (outputs, before))
    equal = statistics.mean(new == old for new, old in zip(outputs, before, strict=True))
    return {"examples": len(outputs), "score": score, "score_in_pytorch": score_before, "equal": equal}


def _model(experiment: Any, task: str, name: str, engine: str) -> Path:
    """Return the folder of a row's model for an engine, which is exported the first time."""
    if engine == "pytorch":
        return experiment.model(task, name)
    folder, (backend, weights) = experiment.folder(task, name) / engine, engine.split("-")
    if not folder.is_dir():
        _say(f"{task}/{name}: exporting to {engine}")
        export(experiment.model(task, name), folder, engine=backend, weights=weights)
    return folder


def load_row(experiment: Any, task: str, name: str, engine: str = "pytorch", dtype: str | None = "float32") -> Any:
    """Return what generates the outputs of a row in an engine: a `TextToText`, or a `FirstToken`."""
    row = experiment.row(task, name)
    if "first" in row:
        llm, slm = (_model(experiment, task, row[part], engine) for part in ("first", "then"))
        return FirstToken(llm, slm, dtype=dtype)
    return TextToText.from_pretrained(_model(experiment, task, name, engine), dtype=dtype)


def _say(text: str) -> None:
    print(text, flush=True)


def _llm_of(row: dict[str, Any], name: str) -> str:
    return row.get("outputs_of") or row.get("behind") or row.get("cut") or row.get("first") or name


def _counts(metric: str, outputs: list[str], examples: list[dict[str, Any]]) -> np.ndarray:
    """Return a row of numbers for each example, from which the score of any choice of examples follows."""
    pairs = list(zip(outputs, examples, strict=True))
    if metric == "bleu":
        return sentence_counts(outputs, [example["target"] for example in examples])
    if metric == "exact_match":
        return np.array([[100.0 * _is_match(output, example)] for output, example in pairs])
    scorer = RougeScorer(["rougeL", "rouge1", "rouge2"])

    def rouge(output: str, references: list[str]) -> list[float]:
        found = [scorer.score(reference, output) for reference in references]
        return [100 * max(one[name].fmeasure for one in found) for name in scorer.rouge_types]

    return np.array([rouge(output, example["references"]) for output, example in pairs])


def _is_match(output: str, example: dict[str, Any]) -> bool:
    """Return whether an output equals a reference without surrounding white space, or holds the same list."""
    if example["task"] in SETS:
        return any(_listed(output) == _listed(reference) for reference in example["references"])
    return output.strip() in {reference.strip() for reference in example["references"]}


def _listed(text: str) -> list[str]:
    return sorted(part.strip() for part in text.split(","))


def _score(counts: np.ndarray) -> float:
    return bleu_of(counts) if counts.shape[1] == 10 else float(counts[:, 0].mean())


def _share(own: np.ndarray, llm: np.ndarray) -> float:
    """Return a score as a part of the LLM's; 0 if the LLM's is 0, as it may be in a resample."""
    return _score(own) / _score(llm) if _score(llm) else 0.0


def _compared(own: np.ndarray, llm: np.ndarray) -> dict[str, Any]:
    """Return a score and its share of the LLM's, each with a 95 % interval; and further scores, if there are any."""
    compared = {
        "score": _score(own),
        "interval": interval(lambda chosen: _score(own[chosen]), len(own)),
        "share": _share(own, llm),
        "share_interval": interval(lambda chosen: _share(own[chosen], llm[chosen]), len(own)),
    }
    return {**compared, "others": own[:, 1:].mean(0).tolist()} if own.shape[1] == 3 else compared


def _time(
    experiment: Any, task: str, names: list[str], engines: Sequence[str] = ("pytorch", *ENGINES)
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Time outputs one at a time and in batches, all rows in all engines in turns; return, by row and engine, medians
    over the rounds, also as parts of the LLM's time in the same engine and in its fastest one.
    """
    prompts = [row["prompt"] for row in experiment.examples(task, "test")[:PROMPTS_IN_BATCHES]]
    options = {"max_new_tokens": experiment.settings["tasks"][task]["max_new_tokens"], "do_sample": False}

    def time_round(model: Any, chosen: list[str]) -> dict[str, float]:
        alone = time_in_turns({"model": partial(time_output, model, **options)}, chosen[:PROMPTS_ALONE])["model"]
        batched = seconds_of(lambda: model.generate(chosen, BATCH, **options))
        return {**speed(alone), "ms_per_output_in_batches": 1000 * batched / len(chosen)}

    models = {}
    for name in names:
        for engine in engines:
            models[f"{name} {engine}"] = partial(time_round, load_row(experiment, task, name, engine))
    _say(f"{task}: timing {len(models)} models in {ROUNDS} rounds")
    rounds = time_in_turns(models, [prompts] * ROUNDS, warm_up=prompts[:1])
    times: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for name in names:
        llm = _llm_of(experiment.row(task, name), name)
        of_llm = {engine: rounds[f"{llm} {engine}"] for engine in engines}
        for engine in engines:
            own = rounds[f"{name} {engine}"]
            timed: dict[str, Any] = {"speed": {key: statistics.median(one[key] for one in own) for key in own[0]}}
            for key in ("ms_per_output", "ms_per_output_in_batches"):
                best = min(of_llm.values(), key=lambda found: statistics.median(one[key] for one in found))
                for suffix, other in (("by_llm", of_llm[engine]), ("by_best_llm", best)):
                    timed[f"{key}_{suffix}"] = statistics.median(
                        one[key] / another[key] for one, another in zip(own, other, strict=True)
                    )
            times[name][engine] = timed
    return times


def _draft(experiment: Any, task: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """
    Time the LLM alone, with drafts that it looks up in the prompt, and with each of its rows that draft for it, in
    turns, one prompt at a time. Return medians, also of the ratios to the LLM alone, and the part of equal outputs.
    """
    options = {"max_new_tokens": experiment.settings["tasks"][task]["max_new_tokens"], "do_sample": False}
    prompts = [row["prompt"] for row in experiment.examples(task, "test")[:PROMPTS_ALONE]]
    drafts: dict[str, dict[str, Any]] = {}
    for llm_name in (name for name in names if _llm_of(experiment.row(task, name), name) == name):
        llm = TextToText.from_pretrained(experiment.model(task, llm_name), dtype="float32")
        ways: dict[str, dict[str, Any]] = {llm_name: {}, "prompt lookup": {"prompt_lookup_num_tokens": LOOKED_UP}}
        for name in names:
            settings = experiment.row(task, name)  # only SLMs that continue the LLM's cache, or read prompts, draft
            drafts_for = "first" not in settings and settings.get("fusion", "cache") == "cache"
            if name != llm_name and _llm_of(settings, name) == llm_name and drafts_for:
                row = TextToText.from_pretrained(experiment.model(task, name), dtype="float32")
                model = row.model.as_assistant_of(llm.model) if row.is_llm2slm else row.model
                ways[name] = {"assistant_model": model}
        _say(f"{task}: timing drafts for {llm_name}")
        outputs: dict[str, list[str]] = {name: [] for name in ways}

        def write(prompt: str, name: str, way: dict[str, Any], llm: Any = llm, outputs: Any = outputs) -> float:
            return seconds_of(lambda: outputs[name].extend(llm.generate([prompt], 1, **options, **way)))

        contestants = {name: partial(write, name=name, way=way) for name, way in ways.items()}
        times = time_in_turns(contestants, prompts * ROUNDS, warm_up=prompts[0])
        for name, own in times.items():
            alone, plain = times[llm_name], outputs[llm_name]
            drafts[name] = {
                "ms_per_output": 1000 * statistics.median(own),
                "by_llm": statistics.median(one / other for one, other in zip(own, alone, strict=True)),
                "equal": statistics.mean(new == old for new, old in zip(outputs[name], plain, strict=True)),
            }
    return drafts


def table(task: str, result: dict[str, Any]) -> str:
    """Return the rows of a task as a Markdown table."""
    metric = result["task"]["metric"]
    lines = [
        f"### {task}, {metric}",
        "",
        "| row | validation | test | % of the LLM | several tokens, % of the LLM | decoding parameters "
        "| ms per output | of the LLM | in batches, of the LLM |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in result["rows"].items():
        test, times = row["test"], row["speed"]
        low, high = (100 * bound for bound in test["all"]["share_interval"])
        cells = [
            name, f"{row['validation']['all']['score']:.1f}", f"{test['all']['score']:.1f}",
            f"{100 * test['all']['share']:.1f} ({low:.1f} to {high:.1f})",
            f"{100 * test['several_tokens']['share']:.1f}", f"{row['parameters']['decode'] / 1e6:.0f}M",
            f"{times['ms_per_output']:.0f}", f"{row['ms_per_output_by_llm']:.2f}",
            f"{row['ms_per_output_in_batches_by_llm']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_engine_table(result), "", "| drafts for the LLM | ms per output | of the LLM | equal |"]
    lines += ["| --- | --: | --: | --: |"]
    for name, draft in result["drafts"].items():
        lines.append(
            f"| {name} | {draft['ms_per_output']:.0f} | {draft['by_llm']:.2f} | {100 * draft['equal']:.0f} % |"
        )
    return "\n".join([*lines, "", f"Not run: {', '.join(result['not_run']) or 'nothing'}."])


def _engine_table(result: dict[str, Any]) -> list[str]:
    """Return the times of each row in each engine, and what quantized weights score, as lines of a Markdown table."""
    lines = [
        "| row | engine | ms per output | of the LLM | of the LLM's best | in batches, ms | of the LLM | of its best "
        "| score, in PyTorch (part of test) | equal outputs |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in result["rows"].items():
        for engine, times in {"pytorch": row, **row["engines"]}.items():
            ratios = [
                [f"{times[f'{key}_{suffix}']:.2f}" for suffix in ("by_llm", "by_best_llm")]
                for key in ("ms_per_output", "ms_per_output_in_batches")
            ]
            alone, batched = (times["speed"][key] for key in ("ms_per_output", "ms_per_output_in_batches"))
            cells = [name, engine, f"{alone:.0f}", *ratios[0], f"{batched:.1f}", *ratios[1], "", ""]
            if part := times.get("test_part"):
                cells[-2:] = f"{part['score']:.1f}, {part['score_in_pytorch']:.1f}", f"{100 * part['equal']:.1f} %"
            lines.append(f"| {' | '.join(cells)} |")
    return lines
