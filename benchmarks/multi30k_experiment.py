"""
The jobs of the Multi30k experiment: what each needs, whether it is done, and how to do it.

Everything is trained on the training split and selected on the validation split. A trained model generates for the
test split once; its outputs are in `outputs.json`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from benchmarks.tokenizer import train_tokenizer
from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.data.atomic import atomic_write
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import write_json
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import DataSettings, DistillSettings, EncodeSettings
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.states.store import is_complete
from modeling_llm2slm.training.distillation import distill
from modeling_llm2slm.training.recipe import load_recipe
from modeling_llm2slm.training.run import train


ROOT = Path(__file__).parents[1]
EXPERIMENT = ROOT / "configuration" / "recipes" / "multi30k.yaml"
PARTS = ("vocabulary", "max_new_tokens", "distilled", "models", "recipes", "rows")
ENGINES = ("ctranslate2", "openvino")  # a row may run the model of another row in one of them, in int8
SOURCE = DataSettings(prompt_column="source")
REFERENCES = {"train": "train.jsonl.gz", "validation": "val.jsonl.gz", "test": "test_2016_flickr.jsonl.gz"}


@dataclass(frozen=True)
class Job:
    """
    A step of the experiment.

    Args:
        pair: The language pair.
        name: Folder of the result: `tokenizer`, `states`, `distilled` or a row's name, with its seed unless that is 0.
        needs: Names of the jobs that it needs.
        row: For a row, its settings in the experiment's file.
        seed: Seed of its weights and its training.
    """

    pair: str
    name: str
    needs: tuple[str, ...]
    row: dict[str, Any] | None = field(default=None, hash=False)
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.pair}/{self.name}"


class Experiment:
    """
    An experiment, and its results so far.

    Args:
        data: Folder with a folder for each language pair.
        runs: Folder of the results.
        file: File that describes the experiment.

    Raises:
        ValueError: If the file does not describe an experiment.
    """

    def __init__(self, data: Path, runs: Path, file: Path = EXPERIMENT):
        self.data, self.runs, self.file = data, runs, file
        self.settings = load_recipe(file)
        missing = [name for name in PARTS if name not in self.settings]
        if missing:
            raise ValueError(f"{file} is not an experiment: it has no {missing[0]}. See {EXPERIMENT}.")
        engine = self.settings["distilled"].get("engine", "ctranslate2")
        if engine != "ctranslate2":
            raise ValueError(
                f"{file}: unknown engine {engine!r}. Use ctranslate2, or leave it out for generate() of transformers."
            )
        self._done: set[str] = set()

    @cached_property
    def jobs(self) -> list[Job]:
        """All jobs in the order of the file; a job that several rows need comes right before the first of them."""
        jobs: dict[str, Job] = {}
        for pair, rows in self.settings["rows"].items():
            for name, row in rows.items():
                for seed in range(row.get("seeds", 1)):
                    for job in self._with_needs(Job(pair, f"{name}-{seed}" if seed else name, (), row, seed), rows):
                        jobs.setdefault(job.key, job)
        return list(jobs.values())

    def _with_needs(self, job: Job, rows: dict[str, Any]) -> Iterator[Job]:
        row: dict[str, Any] = job.row or {}
        parts = [part for part in row.get("build", {}).values() if part in rows]
        converted = [row[engine] for engine in ENGINES if engine in row]
        needs = [*parts, *(converted or ["tokenizer"])]
        yield Job(job.pair, "tokenizer", ())
        if self.uses_states(row):
            needs.append("states")
            yield Job(job.pair, "states", ("llm",))
        if row.get("targets") == "distilled":
            needs.append("distilled")
            yield Job(job.pair, "distilled", ("llm",))
        yield Job(job.pair, job.name, tuple(needs), row, job.seed)

    def uses_states(self, row: dict[str, Any]) -> bool:
        """Return whether a row trains on stored hidden states: of a frozen LLM's last layer."""
        parts = row.get("build", {})
        return {"llm", "slm"} <= set(parts) and not {"encoder_layer", "freeze_llm"} & set(parts)

    def split(self, pair: str, name: str) -> Path:
        """Return the file of a split."""
        return self.data / pair / REFERENCES[name]

    def is_done(self, job: Job) -> bool:
        """Return whether a job is done; remembered, because checking a store opens all its files."""
        folder = self.runs / job.pair / job.name
        last = {"tokenizer": "tokenizer.json", "distilled": "train.jsonl"}
        if job.key not in self._done and (
            is_complete(folder) if job.name == "states" else (folder / last.get(job.name, "outputs.json")).is_file()
        ):
            self._done.add(job.key)
        return job.key in self._done

    def needed(self, job: Job) -> list[Job]:
        """Return the jobs that a job needs."""
        return [other for other in self.jobs if other.pair == job.pair and other.name in job.needs]

    def check(self, job: Job) -> None:
        """Raise `ValueError` if a job was started with other settings."""
        made_by = self._made_by(job)
        if made_by.is_file() and json.loads(made_by.read_text(encoding="utf-8")) != self._settings(job):
            raise ValueError(
                f"{self.runs / job.pair / job.name} was started by another version of the experiment. Remove it and "
                f"{made_by}, or name another folder with --runs."
            )

    def _made_by(self, job: Job) -> Path:
        return self.runs / job.pair / "made-by" / f"{job.name}.json"

    def _settings(self, job: Job) -> dict[str, Any]:
        """Return everything that a job's result depends on, except the data and the code."""
        row, models = job.row or {}, self.settings["models"]
        names = ["vocabulary", "max_new_tokens", *(["distilled"] if job.name == "distilled" else [])]
        return {
            **{name: self.settings[name] for name in names},
            "row": {name: value for name, value in row.items() if name != "seeds"},
            "seed": job.seed,
            "recipe": self._fields(row) if "recipe" in row else {},
            "models": {part: models[part] for part in row.get("build", {}).values() if part in models},
            "needs": {other.name: self._settings(other) for other in self.needed(job)},
        }

    def _fields(self, row: dict[str, Any]) -> dict[str, Any]:
        recipes = self.settings["recipes"]
        return {**recipes["all"], **recipes[row["recipe"]]}

    def do(self, job: Job) -> None:
        """Do a job."""
        self.check(job)
        folder, made_by = self.runs / job.pair, self._made_by(job)
        made_by.parent.mkdir(parents=True, exist_ok=True)
        write_json(made_by, self._settings(job))
        if job.row is not None:
            self._do_row(job, job.row, folder / job.name)
        elif job.name == "tokenizer":
            texts = load_examples(str(self.split(job.pair, "train")), SOURCE)
            with atomic_write(folder / job.name) as temporary:
                tokenizer = train_tokenizer([*texts["prompt"], *texts["target"]], self.settings["vocabulary"])
                tokenizer.save_pretrained(temporary)
        elif job.name == "states":
            with tempfile.TemporaryDirectory() as start:
                row = next(row for row in self.settings["rows"][job.pair].values() if self.uses_states(row))
                self._build(job.pair, row).save_pretrained(start)
                data = [self.split(job.pair, name) for name in ("train", "validation")]
                encode(start, data, folder / job.name, EncodeSettings(prompt_column="source"))
        else:
            self._distill(job.pair, folder / job.name)

    def _distill(self, pair: str, folder: Path) -> None:
        options = {**self.settings["distilled"], "max_new_tokens": self.settings["max_new_tokens"]}
        train, llm, output = self.split(pair, "train"), self.model(pair, "llm"), folder / "train.jsonl"
        column = "target"  # replaces the references, which remain in the validation data
        folder.mkdir(exist_ok=True)
        if "engine" not in options:
            distill(llm, train, output, DistillSettings(prompt_column="source", column=column, **options))
            return
        del options["engine"]
        model = CTranslate2TextToText(llm, folder / "model", "float32")
        rows = Dataset.from_json(str(train)).map(
            lambda batch: {column: model.generate(batch["source"], **options)},
            batched=True, batch_size=1000, load_from_cache_file=False,
        )  # fmt: skip
        with atomic_write(output) as temporary:
            rows.to_json(temporary, force_ascii=False)

    def model(self, pair: str, row: str) -> Path:
        """Return the folder of a row's trained model."""
        return self.runs / pair / row / "model"

    def _build(self, pair: str, row: dict[str, Any], seed: int = 0) -> TextToText:
        arguments, folder = dict(row["build"]), self.runs / pair
        parts = [part for part in ("llm", "slm") if part in arguments]
        for part in parts:
            name = arguments[part]
            if name in self.settings["models"]:
                config = folder / "models" / f"{name}.json"
                config.parent.mkdir(parents=True, exist_ok=True)
                write_json(config, {**self.settings["models"][name], "vocab_size": self.settings["vocabulary"]})
                arguments |= {part: str(config), f"{part}_tokenizer": str(folder / "tokenizer")}
            else:
                arguments[part] = str(self.model(pair, name))
        with tempfile.TemporaryDirectory() as chosen:
            if {"encoder_layers", "decoder_layers"} & set(row):
                whole = TextToText.from_pretrained(arguments[parts[-1]])
                choose_layers(whole.model, row.get("encoder_layers"), row.get("decoder_layers"))
                whole.save_pretrained(chosen)
                arguments[parts[-1]] = chosen
            return build(**arguments, seed=seed)

    def _do_row(self, job: Job, row: dict[str, Any], folder: Path) -> None:
        if "build" in row:
            if not (folder / "start").exists():
                with atomic_write(folder / "start") as temporary:
                    self._build(job.pair, row, job.seed).save_pretrained(temporary)
            if not (folder / "model" / "training.json").is_file():
                train(self.recipe(job))
        model = self.load(job.pair, job.name, row)
        prompts = load_examples(str(self.split(job.pair, "test")), SOURCE)["prompt"][:]
        options = {"batch_size": 50, "max_new_tokens": self.settings["max_new_tokens"]}
        outputs = {str(beams): model.generate(prompts, num_beams=beams, **options) for beams in (1, 4)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "outputs.json", outputs)

    def recipe(self, job: Job) -> dict[str, Any]:
        """Return the recipe that trains a row."""
        row, folder = job.row or {}, self.runs / job.pair
        recipe = {**self._fields(row), "seed": job.seed}
        recipe["generation"] = {"max_new_tokens": self.settings["max_new_tokens"]}
        recipe |= {"model": str(folder / job.name / "start"), "output_dir": str(folder / job.name / "model")}
        recipe |= {"train_data": str(self.split(job.pair, "train")), "target_column": "target"}
        recipe["validation_data"] = str(self.split(job.pair, "validation"))
        if row.get("targets") == "distilled":
            recipe["train_data"] = str(folder / "distilled" / "train.jsonl")
        if self.uses_states(row):
            recipe["llm_states"] = str(folder / "states")
        return recipe

    def load(self, pair: str, name: str, row: dict[str, Any]) -> Any:
        """Load a row's trained model."""
        folder = self.model(pair, name)
        if "ctranslate2" in row:
            return CTranslate2TextToText(self.model(pair, row["ctranslate2"]), folder)
        if "openvino" in row and not folder.exists():
            export(self.model(pair, row["openvino"]), folder, engine="openvino", weights="int8")
        return TextToText.from_pretrained(folder)


def choose_layers(t5: Any, encoder: list[int] | None = None, decoder: list[int] | None = None) -> None:
    """
    Keep some layers of a T5, or repeat them to start a deeper model (Gong et al., 2019).

    Args:
        t5: The model, which is changed in place.
        encoder: Numbers of the encoder's layers. Start with 0, which holds the relative positions. Default: all.
        decoder: Numbers of the decoder's layers, likewise.
    """
    for stack, chosen in ((t5.encoder, encoder), (t5.decoder, decoder)):
        if chosen is None:
            continue
        stack.block = nn.ModuleList(copy.deepcopy(stack.block[layer]) for layer in chosen)
        for index, block in enumerate(stack.block):
            for attention in [module for module in block.modules() if isinstance(module, T5Attention)]:
                attention.layer_idx = index
                if index and attention.has_relative_attention_bias:
                    attention.has_relative_attention_bias = False
                    del attention.relative_attention_bias
        stack.config.num_layers = len(chosen)
    t5.config.num_layers = t5.encoder.config.num_layers
    t5.config.num_decoder_layers = t5.decoder.config.num_layers


class CTranslate2TextToText:
    """
    Runs an LLM in CTranslate2, with the methods of [`TextToText`] that scoring and timing use.

    Args:
        llm: Checkpoint of the LLM.
        folder: Folder of the converted model, which is written if it does not exist.
        compute_type: Type of the weights and of the computation.
    """

    def __init__(self, llm: Path, folder: Path, compute_type: str = "int8"):
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoTokenizer

        if not folder.exists():
            with atomic_write(folder) as temporary:
                TransformersConverter(str(llm)).convert(str(temporary), quantization=compute_type, force=True)
        self.tokenizer = AutoTokenizer.from_pretrained(llm)
        self.translator = ctranslate2.Translator(
            str(folder), device="cpu", intra_threads=torch.get_num_threads(), compute_type=compute_type
        )

    def generate(self, prompts: list[str], batch_size: int = 32, **options: Any) -> list[str]:
        tokens = self.generate_tokens(prompts, batch_size, **options)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def generate_tokens(
        self, prompts: list[str], batch_size: int = 32, num_beams: int = 1, max_new_tokens: int = 64
    ) -> list[list[int]]:
        words = [self.tokenizer.convert_ids_to_tokens(ids) for ids in self.tokenizer(prompts).input_ids]
        results = self.translator.translate_batch(
            words, max_batch_size=batch_size, beam_size=num_beams, max_decoding_length=max_new_tokens
        )
        end = self.tokenizer.eos_token_id
        return [[*self.tokenizer.convert_tokens_to_ids(result.hypotheses[0]), end] for result in results]
