"""
Measure what a shorter prompt costs: an SLM that reads the LLM's hidden states in groups of 2 or 4 tokens.

    python -m benchmarks.prompt_stride                                     # the demonstration's LLM and data
    python -m benchmarks.prompt_stride --task multi30k --data /path/to/data
    python -m benchmarks.prompt_stride --task operations                   # of T5-large sizes; trains nothing
    python -m benchmarks.prompt_stride --task time                         # likewise; 17 minutes on a quiet machine

The groups begin at one end of the prompt's own tokens, so padding changes none of them. `mean` averages the hidden
states and the embeddings of a group, `project` maps them together, by wider first matrices. Multi30k, English to
German, is trained like `configuration/recipes/multi30k_short.yaml`, but shorter and with a shallower LLM. Finished
rows are skipped. The results are in docs/results/prompt-stride.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM
from transformers import initialization as init

from benchmarks.gpu import full, with_slm
from benchmarks.multi30k_experiment import ROOT, Experiment, Job
from benchmarks.multi30k_report import bleu_of, difference, sentence_counts
from examples.demo import DATA, HERE
from examples.demo import LLM as DEMO_LLM
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.contestants import endless
from modeling_llm2slm.cache_llm2slm import PromptStates, padding_to, reorder
from modeling_llm2slm.conversion.build import build, preset_config
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.evaluation.timing import time_in_turns, time_tokens
from modeling_llm2slm.fusion_llm2slm import Add, embedding_rms, register_fusion
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import BuildSettings, DataSettings
from modeling_llm2slm.training.memory import make_fake, without_storage
from modeling_llm2slm.training.recipe import load_recipe
from modeling_llm2slm.training.run import train


OUTPUT = ROOT / "docs" / "results" / "prompt-stride.json"
SHORT = ROOT / "configuration" / "recipes" / "multi30k_short.yaml"
PAIR, LLM = "en-de", "llm"
SPLITS = ("validation", "test")
FUSIONS = {f"strided-{pooling}-{stride}": (pooling, stride) for stride in (2, 4) for pooling in ("mean", "project")}
ROWS = {"add": "add", **{name.replace("strided", "add"): name for name in FUSIONS}}  # the fusion of each row
TASKS = ("demo", "multi30k", "operations", "time")
ENCODER_LAYER = 18  # of the 24 of T5-large
PRESETS = ("t5-large_gpt2", "t5-large_t5-small")


class Strided(Add):
    """`add` over groups of `stride` neighbouring tokens: P has one position for each group."""

    pooling, stride = "mean", 1

    def add_modules(self, encoder: Any) -> None:
        super().add_modules(encoder)
        if self.pooling == "project":
            projector, embedding = encoder.projector, encoder.prompt_embedding
            projector.linear_1 = nn.Linear(projector.linear_1.in_features * self.stride, self.config.prompt_size)
            for name in ("mean", "scale"):
                setattr(projector, name, nn.Buffer(getattr(projector, name).repeat(self.stride)))
            size = self.config.prompt_size if embedding is None else embedding.in_features
            encoder.prompt_embedding = nn.Linear(size * self.stride, self.config.prompt_size, bias=False)

    def initialize(self, encoder: Any) -> None:
        if self.pooling == "mean":
            super().initialize(encoder)
            return
        mean, scale = (part.repeat(self.stride) for part in encoder.hidden_states_scale())
        embedding, size = encoder.prompt_embedding, 0.0
        if self.table == "slm":  # P begins as the mean of the SLM's own embeddings
            init.copy_(embedding.weight, torch.eye(self.config.prompt_size).repeat(1, self.stride) / self.stride)
        else:
            size = embedding_rms(encoder.slm) / 2**0.5
            init.normal_(embedding.weight, std=size / (embedding_rms(encoder.llm) * embedding.in_features**0.5))
        encoder.projector.initialize(mean, scale, size)

    def group(self, values: torch.Tensor, mask: torch.Tensor, side: str, filler: Any = 0.0) -> torch.Tensor:
        """Return groups `(B, N / stride, ...)` of values `(B, N, d)` whose padding is on one side."""
        more = -values.shape[1] % self.stride
        values = nn.functional.pad(values, (0, 0, *((more, 0) if side == "left" else (0, more))))
        values = values.unflatten(1, (-1, self.stride))
        mask = mask[..., None]
        if self.pooling == "mean":
            return (values * mask).sum(2) / mask.sum(2).clamp(min=1)
        return values.where(mask != 0, filler).flatten(2)

    def read_prompt(
        self, encoder: Any, llm_outputs: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor
    ) -> PromptStates:
        has_encoder = self.config.decoder.is_encoder_decoder
        side = "right" if has_encoder else "left"
        order = padding_to(side, attention_mask)
        mask = reorder(attention_mask, order)
        more = -mask.shape[1] % self.stride
        mask = nn.functional.pad(mask, (more, 0) if side == "left" else (0, more)).unflatten(1, (-1, self.stride))
        states = reorder(llm_outputs.last_hidden_state, order)
        embeds = reorder(encoder.embed_tokens(input_ids), order)
        filler = encoder.projector.mean[: states.shape[-1]].to(states)
        embeds = self.combine(encoder, self.group(states, mask, side, filler), self.group(embeds, mask, side))
        mask = mask.amax(-1)
        if has_encoder:
            embeds = encoder.slm.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return PromptStates(embeds, mask)


for _name, (_pooling, _stride) in FUSIONS.items():
    register_fusion(type("Strided", (Strided,), {"name": _name, "pooling": _pooling, "stride": _stride}))


class Strides(Experiment):
    """The short Multi30k experiment with other rows: one SLM for each stride and pooling behind the same LLM."""

    def __init__(self, data: Path, runs: Path, epochs: dict[str, int] | None = None):
        super().__init__(data, runs, SHORT)
        recipes = self.settings["recipes"]
        recipes["all"] = {**recipes["all"], "warmup_steps": 200, "metric": "loss"}
        recipes["t5"] = {**recipes["t5"], "num_train_epochs": (epochs or {}).get("t5", 3)}
        recipes["gpt2"] = {**recipes["gpt2"], "num_train_epochs": (epochs or {}).get("gpt2", 3)}
        behind = {"llm": LLM, "slm": "gpt2-2"}
        builds = {name: behind | ({"fusion": fusion} if fusion in FUSIONS else {}) for name, fusion in ROWS.items()}
        rows = {name: {"build": parts, "recipe": "gpt2"} for name, parts in builds.items()}
        self.settings["rows"] = {PAIR: {LLM: {"build": {"llm": "t5-3-3"}, "recipe": "t5"}, **rows}}

    def _do_row(self, job: Job, row: dict[str, Any], folder: Path) -> None:
        """Train a row, and generate greedily for both splits."""
        if not (folder / "start").exists():
            self._build(job.pair, row, job.seed).save_pretrained(folder / "start")
        if not (folder / "model" / "training.json").is_file():
            train(self.recipe(job))
        prompts = {split: examples_of(self.split(job.pair, split), "source")["prompt"][:] for split in SPLITS}
        write_outputs(self.load(job.pair, job.name, row), prompts, folder)


def examples_of(file: str | Path, prompt_column: str = "prompt") -> Any:
    """Return the examples of a file, with columns `prompt` and `target`."""
    return load_examples(str(file), DataSettings(prompt_column=prompt_column))


def write_outputs(model: Any, prompts: dict[str, list[str]], folder: Path) -> None:
    """Write a model's greedy outputs for each split."""
    options = {"batch_size": 50, "max_new_tokens": 64}
    # `generate()` refuses prompts that are encoded ahead, as their mask is wider than the groups. For the same reason,
    # the best checkpoint is chosen by the validation loss.
    model.read = partial(TextToText.read, model)
    write_json(folder / "outputs.json", {split: model.generate(texts, **options) for split, texts in prompts.items()})


def run_multi30k(data: Path, runs: Path) -> dict[str, Any]:
    """Do the jobs of Multi30k that are not done, and return the scores of all."""
    experiment = Strides(data / "multi30k", runs)
    for job in experiment.jobs:
        experiment.check(job)
        if not experiment.is_done(job):
            print(job.key, flush=True)
            experiment.do(job)
    references = {split: examples_of(experiment.split(PAIR, split), "source")["target"][:] for split in SPLITS}
    settings = {name: experiment.settings[name] for name in ("models", "recipes", "rows")}
    return {"settings": settings, "rows": scores_of(experiment.runs / PAIR, [LLM, *ROWS], references)}


def run_demo(runs: Path, steps: int, names: Sequence[str]) -> dict[str, Any]:
    """Train rows of the demonstration that are not done, and return the scores of all that are."""
    data = {split: examples_of(DATA[split]) for split in SPLITS}
    for name in names:
        folder = runs / name
        if (folder / "outputs.json").is_file():
            continue
        print(name, flush=True)
        llm = str(DEMO_LLM)
        settings = BuildSettings(slm_tokenizer=llm, fusion=ROWS[name], encoder_dtype="float32", seed=0)
        built = build(llm, str(HERE / "gpt2.json"), settings)
        built.save_pretrained(folder / "start")
        options: dict[str, Any] = {
            "model": str(folder / "start"),
            "output_dir": str(folder / "model"),
            "metric": "loss",
        }
        options |= {"train_data": DATA["train"], "validation_data": DATA["validation"]}
        options |= dict.fromkeys(("max_steps", "eval_steps", "save_steps"), steps)
        train(load_recipe(HERE / "slm.yaml", options))
        model = TextToText.from_pretrained(folder / "model")
        write_outputs(model, {split: examples["prompt"][:] for split, examples in data.items()}, folder)
    references = {split: examples["target"][:] for split, examples in data.items()}
    return {"settings": {"steps": steps}, "rows": scores_of(runs, list(ROWS), references)}


def scores_of(runs: Path, names: Sequence[str], references: dict[str, list[str]]) -> dict[str, Any]:
    """Return the BLEU of each row, and its difference from that of stride 1 with its 95 % interval."""
    names = [name for name in names if (runs / name / "outputs.json").is_file()]
    rows: dict[str, Any] = {name: {} for name in names}
    for split, texts in references.items():
        counts = {
            name: sentence_counts(json.loads((runs / name / "outputs.json").read_text("utf-8"))[split], texts)
            for name in names
        }
        for name, own in counts.items():
            more = difference(own, counts["add"]) if ROWS.get(name) in FUSIONS else {}
            rows[name][split] = {"bleu": bleu_of(own), **more}
    return rows


def run_operations(prompt: int = 512, output: int = 32) -> dict[str, Any]:
    """Return the LLM's operations divided by those of LLM-to-SLM, for each stride and for an SLM of no cost."""
    rows: dict[str, Any] = {}
    for preset in PRESETS:
        config, fake = preset_config(preset), FakeTensorMode()
        config._attn_implementation = "eager"  # the counter misses fused attention
        with torch.device("meta"):
            llm = AutoModelForSeq2SeqLM.from_config(full(config.encoder), attn_implementation="eager")
        composite = without_storage(config)
        for model in (llm, composite):
            make_fake(model, fake)

        def count(model: Any, width: int, fake: Any = fake, size: int = 0, labels: bool = True) -> int:
            with FlopCounterMode(display=False) as counter, fake, torch.no_grad():
                ids, targets = (torch.zeros(1, length, dtype=torch.long) for length in (width, output))
                inputs = {"llm_hidden_states": torch.zeros(1, width, size)} if size else {}
                inputs |= {"labels": targets} if labels else {}
                model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
            return counter.get_total_flops()

        whole, reading = count(llm, prompt), count(llm.get_encoder(), prompt, labels=False)
        slms = {stride: count(composite, prompt // stride, size=config.llm_hidden_size) for stride in (1, 2, 4)}
        rows[preset] = {f"stride {stride}": whole / (reading + slm) for stride, slm in slms.items()}
        rows[preset]["no SLM"] = whole / reading
        llm.encoder.block = llm.encoder.block[:ENCODER_LAYER]
        rows[preset][f"encoder_layer {ENCODER_LAYER}"] = whole / (count(llm.encoder, prompt, labels=False) + slms[1])
    return {"prompt": prompt, "output": output, "llm_operations_by_llm2slm_operations": rows}


def run_time(cell: Cell, presets: Sequence[str] = PRESETS) -> dict[str, Any]:
    """Time the LLM and LLM-to-SLM with each stride in turns, with random weights, in PyTorch and float32."""
    models: dict[str, Any] = {}
    for preset in presets:
        config = preset_config(preset)
        config.encoder_dtype = None
        models.setdefault("llm", AutoModelForSeq2SeqLM.from_config(full(config.encoder), dtype=torch.float32))
        for stride in (1, 2, 4):
            config.fusion = "add" if stride == 1 else f"strided-project-{stride}"
            models[f"{preset} stride {stride}"] = with_slm(models["llm"], config)

    def contestant(model: Any) -> Callable[[Cell], float]:
        def generate(one: Cell) -> float:
            ids = one.ids(models["llm"].config.vocab_size)
            return time_tokens(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, one.output).total

        return generate

    turns = {name: contestant(endless(model.eval())) for name, model in models.items()}
    rounds = time_in_turns(turns, [cell] * cell.repeats, warm_up=Cell(16, 2))
    seconds = {name: statistics.median(times) for name, times in rounds.items()}
    speedups = {name: seconds["llm"] / own for name, own in seconds.items()}
    return {"cell": asdict(cell), "threads": torch.get_num_threads(), "seconds": rounds, "speedups": speedups}


def show(task: str, result: dict[str, Any]) -> None:
    """Print the results of a task."""
    if task in ("operations", "time"):
        print(json.dumps(result, indent=2))
        return
    print("| row | validation BLEU | test BLEU | above stride 1, validation (95 %) |\n| --- | --: | --: | --: |")
    for name, row in result["rows"].items():
        one = row["validation"]
        above = "{:.1f} ({:.1f} to {:.1f})".format(one["above"], *one["above_interval"]) if "above" in one else ""
        print(f"| {name} | {one['bleu']:.1f} | {row['test']['bleu']:.1f} | {above} |")


def main() -> None:
    """Do what is not done of a task, and add its results to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument(
        "--task", choices=("demo", "multi30k", "operations", "time"), default="demo", help="what to measure"
    )
    parser.add_argument("--data", default=os.environ.get("LLM2SLM_DATA", "data"), help="folder that contains multi30k")
    parser.add_argument("--runs", default="runs/prompt-stride", type=Path, help="folder of the models")
    parser.add_argument("--steps", default=1750, type=int, help="steps of each row of the demonstration")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows of the demonstration to train")
    parser.add_argument("--batch", default=32, type=int, help="prompts in a batch that is timed")
    parser.add_argument("--rounds", default=1, type=int, help="rounds of timing; medians count")
    parser.add_argument("--output", default=OUTPUT, type=Path, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = arguments.runs.absolute() / arguments.task
    if arguments.task == "operations":
        result = run_operations()
    elif arguments.task == "time":
        result = run_time(Cell(512, 32, arguments.batch, repeats=arguments.rounds))
    elif arguments.task == "demo":
        result = run_demo(runs, arguments.steps, arguments.rows)
    else:
        result = run_multi30k(Path(arguments.data).absolute(), runs)
    before = json.loads(arguments.output.read_text("utf-8")) if arguments.output.is_file() else {}
    write_json(arguments.output, {**before, arguments.task: {**result, "versions": versions()}})
    show(arguments.task, result)


if __name__ == "__main__":
    main()
