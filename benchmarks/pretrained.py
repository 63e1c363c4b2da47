"""
Run the experiment behind a pretrained LLM: what hands more of the LLM to a small model, and what it costs.

    python -m benchmarks.pretrained --llm gemma3-270m --data /path/to/data --runs runs/pretrained

`configuration/recipes/pretrained.yaml` describes the tasks and the rows. Finished jobs are skipped and stopped ones
resume: repeat the command until it ends with the report. Every row that is done is in the report, whatever is left.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretrained_report import ENGINES, load_row, report
from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.conversion.cut import cut_checkpoint
from modeling_llm2slm.conversion.prune_vocabulary import prune_vocabulary
from modeling_llm2slm.data.atomic import atomic_write
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.settings import DataSettings, DistillSettings
from modeling_llm2slm.training.distillation import distill
from modeling_llm2slm.training.recipe import load_recipe
from modeling_llm2slm.training.run import train


ROOT = Path(__file__).parents[1]
EXPERIMENT = ROOT / "configuration" / "recipes" / "pretrained.yaml"
SPLITS = ("train", "validation", "test")
CHOICE = "validation"  # the split that chooses; `test` is read once, after all choices


class Experiment:
    """
    The experiment, and its results so far.

    Args:
        llm: Folder of the pretrained LLM.
        data: Folder of the data sets.
        runs: Folder of the results.
        file: File that describes the experiment.
    """

    def __init__(self, llm: Path, data: Path, runs: Path, file: Path = EXPERIMENT):
        self.llm, self.data, self.runs, self.file = llm, data, runs, file
        self.settings = load_recipe(file)

    def jobs(self) -> Iterator[tuple[str, Path, Callable[[], None]]]:
        """Yield the name of each job, the file or folder that it writes last, and the job, in an order that works."""
        for task in self.settings["tasks"]:
            for split in SPLITS:
                yield f"{task}/{split}", self.split(task, split), partial(self._write_data, task, split)
        yield "vocabulary", self.runs / "vocabulary", self._prune
        written: set[Path] = set()
        for task, rows in self.settings["rows"].items():
            for name, row in rows.items():
                output = self._outputs(task, row) if "outputs_of" in row else None
                if output is not None and output not in written:  # rows share it
                    written.add(output)
                    yield f"{task}/{output.stem}", output, partial(self._distill, task, row)
                folder = self.folder(task, name)
                yield f"{task}/{name}", folder / "outputs.json", partial(self._do_row, task, name)

    def row(self, task: str, name: str) -> dict[str, Any]:
        """Return the settings of a row."""
        return self.settings["rows"][task][name]

    def folder(self, task: str, name: str) -> Path:
        """Return the folder of a row, with its `start`, `model` and `outputs.json`."""
        return self.runs / task / name

    def split(self, task: str, name: str) -> Path:
        """Return the file of a split, with the columns `prompt`, `target` and `references`."""
        return self.runs / task / "data" / f"{name}.jsonl"

    def examples(self, task: str, split: str) -> list[dict[str, Any]]:
        """Return the rows of a split."""
        return [json.loads(line) for line in self.split(task, split).read_text(encoding="utf-8").splitlines()]

    def model(self, task: str, name: str) -> Path:
        """Return the folder of a row's trained model."""
        return self.folder(task, name) / "model"

    def _write_data(self, task: str, split: str) -> None:
        settings = self.settings["tasks"][task]
        with gzip.open(self.data / settings["folder"] / settings["files"][split], "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        with atomic_write(self.split(task, split)) as temporary, temporary.open("w", encoding="utf-8") as output:
            for row in rows:
                references = row.get("references", [row["target"]])
                example = {"prompt": settings["prompt"].format(**row), "target": settings["target"].format(**row)}
                kept = {**example, "references": references, "task": row.get("task", task)}
                output.write(json.dumps(kept, ensure_ascii=False) + "\n")

    def _prune(self) -> None:
        corpora = [self.split(task, "train") for task in self.settings["tasks"]]
        prune_vocabulary(self.llm, self.runs / "vocabulary", corpora)

    def _outputs(self, task: str, row: dict[str, Any]) -> Path:
        return self.runs / task / f"outputs-of-{row['outputs_of']}-{row['prompts']}.jsonl"

    def _distill(self, task: str, row: dict[str, Any]) -> None:
        settings = DistillSettings(
            num_beams=1,
            batch_size=64,
            max_new_tokens=self.settings["tasks"][task]["max_new_tokens"],
            limit=row["prompts"],
            column="target",  # replaces the references
            dtype=row.get("outputs_dtype", self.settings["tasks"][task].get("dtype")),
        )
        distill(self.model(task, row["outputs_of"]), self.split(task, "train"), self._outputs(task, row), settings)

    def _do_row(self, task: str, name: str) -> None:
        row, folder = self.row(task, name), self.folder(task, name)
        if "first" not in row:
            if not (folder / "start").exists():
                self._build(task, row, folder / "start")
            if not (folder / "model" / "training.json").is_file():
                train(self.recipe(task, name))
        model = load_row(self, task, name, dtype=self.settings["tasks"][task].get("dtype"))
        options = {"max_new_tokens": self.settings["tasks"][task]["max_new_tokens"], "do_sample": False}
        outputs = {}
        for split in (CHOICE, "test"):
            prompts = load_examples(self.split(task, split), DataSettings())["prompt"][:]
            outputs[split] = model.generate(prompts, 64, **options)
        write_json(folder / "outputs.json", outputs)

    def _build(self, task: str, row: dict[str, Any], output: Path) -> None:
        """Write the model that a row starts from."""
        if row.get("start") == "llm":
            output.parent.mkdir(parents=True, exist_ok=True)
            output.symlink_to(self.runs / "vocabulary")
            return
        slm, tokenizer = output.with_name("slm"), self.runs / "vocabulary"
        if "cut" in row:
            cut_checkpoint(self.model(task, row["cut"]), slm, row["layers"], overwrite=True)
            source = str(slm)
        else:
            config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
            source = str(output.with_name("slm.json"))
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(source), {**self.settings["models"][row["start"]], "vocab_size": config["vocab_size"]})
        options: dict[str, Any] = {"slm_tokenizer": str(tokenizer), "seed": row.get("seed", 0)}
        if "behind" in row:
            options |= {"llm": str(self.model(task, row["behind"])), "fusion": row["fusion"], **row.get("build", {})}
        built = build(slm=source, **options)
        if "behind" in row:
            self.change_start(row, built.model)
        with atomic_write(output) as temporary:
            built.save_pretrained(temporary)

    def change_start(self, row: dict[str, Any], model: Any) -> None:
        """Change the new LLM-to-SLM model of a row; an ablation overrides this."""

    def recipe(self, task: str, name: str) -> dict[str, Any]:
        """Return the recipe that trains a row."""
        row, settings = self.row(task, name), self.settings["tasks"][task]
        train_data = self._outputs(task, row) if "outputs_of" in row else self.split(task, "train")
        return {
            **self.settings["recipes"]["all"],
            **self.settings["recipes"][row["recipe"]],
            **row.get("fields", {}),
            "seed": row.get("seed", 0),
            "model": str(self.folder(task, name) / "start"),
            "output_dir": str(self.model(task, name)),
            "train_data": str(train_data),
            "train_samples": row["prompts"],
            "validation_data": str(self.split(task, CHOICE)),
            "validation_samples": settings["validation_samples"],
            "metric": settings["metric"],
            "generation": {"max_new_tokens": settings["max_new_tokens"]},
        }


def main(
    experiment_class: type[Experiment] = Experiment,
    make_report: Callable[..., None] | None = None,
    about: str = __doc__ or "",
) -> None:
    """Run the jobs of an experiment that are not done, and report."""
    parser = argparse.ArgumentParser(description=about.strip().splitlines()[0])
    parser.add_argument("--llm", required=True, type=Path, help="folder of the pretrained LLM")
    parser.add_argument("--data", default=os.environ.get("LLM2SLM_DATA", "data"), type=Path, help="folder of the data")
    parser.add_argument("--experiment", default=EXPERIMENT, type=Path, help="file that describes the experiment")
    parser.add_argument("--runs", default="runs/pretrained", type=Path, help="folder of the results")
    parser.add_argument("--threads", default=2, type=int, help="CPU threads")
    parser.add_argument("--only", nargs="*", help="do only these jobs, such as instructions/llm-4000")
    parser.add_argument("--report", action="store_true", help="report the rows that are done, and train none")
    parser.add_argument("--rows", nargs="*", help="report only these rows, their LLM among them. Default: all")
    parser.add_argument("--name", default="", help="name of the report, such as engines. Default: that of the task")
    parser.add_argument("--engines", nargs="*", default=ENGINES, help="engines to time, besides PyTorch")
    parser.add_argument("--no-drafts", action="store_true", help="time no drafts for the LLM, which take longest")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = experiment_class(
        arguments.llm.absolute(), arguments.data.absolute(), arguments.runs.absolute(), arguments.experiment
    )
    _check_names("row", arguments.rows, [name for rows in experiment.settings["rows"].values() for name in rows])
    _check_names("job", arguments.only, [name for name, _, _ in experiment.jobs()])
    for option in ("llm", "data"):
        if not (folder := getattr(arguments, option)).is_dir():
            parser.error(f"{folder} is no folder. Pass another one with --{option}.")
    for name, result, job in experiment.jobs():
        if result.exists() or arguments.report or (arguments.only and name not in arguments.only):
            continue
        print(f"{name} ...", flush=True)
        start = time.time()
        result.parent.mkdir(parents=True, exist_ok=True)
        job()
        print(f"{name}: done after {(time.time() - start) / 60:.1f} min", flush=True)
    if not arguments.only:
        (make_report or report)(
            experiment,
            only=arguments.rows,
            engines=arguments.engines,
            drafts=not arguments.no_drafts,
            report_name=arguments.name,
        )


def _check_names(kind: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in given or ():
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            raise SystemExit(f"No {kind} is named {name!r}." + (f" Did you mean {nearest[0]}?" if nearest else ""))


if __name__ == "__main__":
    main()
