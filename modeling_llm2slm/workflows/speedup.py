"""Turn an LLM and prompts into a model to serve: distill, cut, build, encode, train, evaluate, each stage once."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoTokenizer

from ..configuration_llm2slm import LLM2SLMConfig, check_length
from ..conversion.build import build, float_dtype, is_config, part_config
from ..conversion.cut import cut_checkpoint, cut_config
from ..data.atomic import atomic_write, remove_unfinished
from ..data.bad_rows import good_rows
from ..data.conversations import (
    conversation_in,
    encode_prompts,
    read_conversations,
    sources_of,
    write_conversations,
)
from ..data.formats import parse_rows
from ..data.loading import ROW, load_prompts
from ..data.output_paths import MODEL_FILES, check_output, locked
from ..data.records import MAPPING, read_record, without_secrets, write_json
from ..evaluation.agreement import compare
from ..inference.engine import fingerprint_of
from ..inference.text_to_text import TextToText
from ..settings import (
    BuildSettings,
    CorpusSettings,
    DataSettings,
    DistillSettings,
    EncodeSettings,
    EvaluateSettings,
    SpeedupSettings,
)
from ..states.encoding import encode
from ..states.loading import load
from ..states.store import is_complete
from ..training.checks import check_trainable
from ..training.distillation import distill
from ..training.recipe import load_recipe, parse_recipe, typed_recipe, with_current_names
from ..training.resuming import REPORT, last_checkpoint, last_failure
from ..training.run import train
from .sizes import layers_to_cut


SPLITS = ("train", "validation", "test")
Progress = Callable[[str, int, int], None]
RECORD = "speedup.json"
EVALUATE_AGAIN = "Remove it, and repeat the command."
RESULTS = (
    "distilled.jsonl", *(f"{split}.jsonl" for split in SPLITS), "slm", "start", "states", "recipe.yaml",
    "model", "evaluation.json",
)  # fmt: skip
# Settings that may not change after a stage has begun.
SETTINGS_OF_DISTILL = ("llm", "prompts", "prompt_column", "limit", "held_out", "num_beams", "max_new_tokens")
SETTINGS_OF_BUILD = ("llm", "llm_sha256", "slm", "slm_tokenizer", "fusion", "encoder_dtype", "max_new_tokens")
# Hashes of local files, with the setting that names them.
CONTENTS = {"llm_sha256": "llm", "prompts_sha256": "prompts"}


class Speedup:
    """
    A speed-up in a folder. A repeated run skips the stages whose results are complete, and resumes the one that was
    interrupted.

    Args:
        settings: The models, the prompts, and how they are used.
        output: The folder for `distilled.jsonl`, its splits, `start`, `states`, `model` (the result) and
            `evaluation.json`.
        device: Device of the LLM. Training uses the accelerator of this machine, if it has one.
        progress: Called with the stage, the number of prompts (or layers left out) that are done, and of all.
        quiet: Show no progress of the training.

    Raises:
        ValueError: If the folder holds a run with other settings, a recipe field is wrong or is set by the speed-up
            itself, or the two models do not fit together.
        OSError: If one of the models cannot be found.
    """

    def __init__(
        self,
        settings: SpeedupSettings,
        output: str | Path,
        device: str = "cpu",
        progress: Progress = lambda stage, done, total: None,
        quiet: bool = False,
    ):
        self.settings = settings
        self.output = Path(output)
        self.device = device
        self.progress = progress
        self.quiet = quiet
        # Fail here, before hours of work, if a later stage would.
        if is_config(settings.llm):
            raise ValueError(
                f"{settings.llm} is a config; speedup needs a trained LLM: a folder or a name on the Hub."
            )
        self.layers = layers_to_cut(settings.slm)
        self.fusion = settings.fusion or ("add" if self.layers is None else "cache")
        self._check_fields()
        self.recipe, self.arguments = parse_recipe(self._recipe())
        check_trainable(self.recipe, self.arguments)
        self._check_folder()
        llm, tokenizer = load(AutoConfig, settings.llm), settings.slm_tokenizer or settings.llm
        if self.layers is not None and llm.is_encoder_decoder:
            raise ValueError(
                f"{settings.llm} is an encoder-decoder, and one with fewer layers is a plain model: make it with "
                "`llm2slm convert cut`, and train it on the LLM's outputs (`llm2slm distill`)."
            )
        decoder = part_config(settings.slm, tokenizer) if self.layers is None else cut_config(llm, self.layers)
        self.config = LLM2SLMConfig(
            encoder=llm, decoder=decoder, fusion=self.fusion, shared_tokenizer=self.layers is not None
        )
        float_dtype("encoder_dtype", settings.encoder_dtype)

    def _check_folder(self) -> None:
        """Raise `ValueError` if the folder holds a run with other settings, or results of something else."""
        check_output(self.output, folder=True, overwrite=True)
        path, record = self.output / RECORD, self._record  # hashes the prompts now, before the LLM reads them
        if not path.is_file():
            names = os.listdir(self.output) if self.output.is_dir() else []
            foreign = sorted(name for name in names if name in RESULTS or MODEL_FILES.fullmatch(name))
            if foreign:
                raise ValueError(
                    f"{self.output} has {foreign[0]}, which no speed-up wrote (there is no {RECORD}). Choose another "
                    "folder with --output."
                )
            return
        begun = read_record(path, "Choose another folder with --output.", {"recipe": MAPPING})
        before, now = self._fixed(begun), self._fixed(record)
        changed = next((name for name in now if before.get(name) != now[name]), None)
        if changed in CONTENTS:
            raise ValueError(
                f"{getattr(self.settings, CONTENTS[changed])} has changed since {self.output} was started. Choose "
                "another folder with --output, or restore its former content."
            )
        if changed is not None:
            name, value = changed, before.get(changed)
            if changed == "recipe":
                name, value = _changed_field(before["recipe"], now["recipe"])
            given = f"with {_option(name, value)}" if value is not None else f"without {_option(name)}"
            raise ValueError(f"{self.output} was started {given}. Use the same value, or another --output.")

    def _check_fields(self) -> None:
        """Raise `ValueError` for recipe fields that the speed-up sets itself."""
        given = with_current_names(self.settings.recipe)
        for name in self._paths():
            if name in given:
                raise ValueError(
                    f"{name} is set by the speed-up itself: leave it out, or train with a recipe of your own "
                    "(`llm2slm train`)."
                )
        if "prompt_column" in given:
            raise ValueError("A speed-up has one prompt column for all stages: set it with --prompt-column.")

    @cached_property
    def _record(self) -> dict[str, Any]:
        """The settings without secrets, with hashes of the prompts and the LLM if they are local files."""
        prompts, settings = Path(self.settings.prompts).expanduser(), asdict(self.settings)
        if prompts.is_file():
            with prompts.open("rb") as file:
                settings["prompts_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if Path(self.settings.llm).is_dir():
            settings["llm_sha256"] = fingerprint_of(self.settings.llm)
        return json.loads(json.dumps({**settings, "recipe": without_secrets(self.settings.recipe)}))

    def _fixed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """
        Return the settings in a record that finished stages, or a training that has begun, depend on. `skip_bad_rows`
        of the recipe may always change.
        """
        recipe = {name: value for name, value in record["recipe"].items() if name != "skip_bad_rows"}
        fixed: dict[str, Any] = {}
        if any((self.output / name).exists() for name in ("distilled.jsonl.part", *RESULTS) if name != "start"):
            fixed |= {name: record.get(name) for name in (*SETTINGS_OF_DISTILL, *CONTENTS)}
            fixed["prompt_max_length"] = recipe.get("prompt_max_length")
        if any((self.output / name / "config.json").is_file() for name in ("slm", "start")):
            fixed |= {name: record.get(name) for name in SETTINGS_OF_BUILD}
        trained, failed = (self.output / "model" / REPORT).is_file(), last_failure(self.output / "model")
        if trained or (last_checkpoint(self.output / "model") and failed is None):
            fixed["recipe"] = recipe
        return fixed

    def stages(self) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Return the stages by name, in order: the command that does the same, and the method that does it here."""
        settings, output, data = self.settings, self.output, self._data_options()
        llm, split = settings.llm, {name: f"{output}/{name}.jsonl" for name in SPLITS}
        reading = {**data, "batch_size": settings.batch_size, "device": self.device}
        generating = {"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
        return {
            "distill": (
                _command(
                    "distill", llm, settings.prompts, output=f"{output}/distilled.jsonl",
                    prompt_column=settings.prompt_column, limit=settings.limit, **generating, **reading,
                ),
                self.distill,
            ),
            **self._cut_stage(),
            "build": (
                _command(
                    "build", f"{output}/start", llm=llm, slm=self._slm, slm_tokenizer=settings.slm_tokenizer,
                    fusion=self.fusion, encoder_dtype=settings.encoder_dtype,
                    max_new_tokens=settings.max_new_tokens,
                ),
                self.build,
            ),
            "encode": (
                _command(
                    "encode", f"{output}/start", split["train"], split["validation"], output=f"{output}/states",
                    **reading,
                ),
                self.encode,
            ),
            "train": (_command("train", f"{output}/recipe.yaml"), self.train),
            "evaluate": (
                _command(
                    "evaluate", f"{output}/model", split["test"], against=llm, output=f"{output}/evaluation.json",
                    max_new_tokens=settings.max_new_tokens, device=self.device, **data,
                ),
                self.evaluate,
            ),
        }  # fmt: skip

    @property
    def _slm(self) -> str:
        return self.settings.slm if self.layers is None else f"{self.output}/slm"

    def _cut_stage(self) -> dict[str, tuple[str, Callable[[], Any]]]:
        if self.layers is None:
            return {}
        layers = str(self.layers).strip("[]").replace(" ", "")
        chosen: dict[str, Any] = {}
        if isinstance(self.layers, int):
            chosen = {"data": f"{self.output}/train.jsonl", "target_column": DistillSettings.column}
            chosen |= {"prompt_max_length": self.recipe.prompt_max_length}
        command = _command("convert", "cut", self.settings.llm, self._slm, layers=layers, **chosen)
        return {"cut": (command, self.cut)}

    def _data_options(self) -> dict[str, Any]:
        """Return the recipe's settings that hold for every stage that reads data."""
        return {"prompt_max_length": self.recipe.prompt_max_length, "skip_bad_rows": self.recipe.skip_bad_rows}

    def run(self, announce: Callable[[str, str], None] = lambda stage, command: None) -> dict[str, Any]:
        """
        Run all stages that are not complete.

        Args:
            announce: Called with the name of each stage and the command that does the same.

        Returns:
            The evaluation, see [`compare`].
        """
        with locked(self.output):
            for stage, (command, work) in self.stages().items():
                announce(stage, command)
                work()
        return read_record(self.output / "evaluation.json", EVALUATE_AGAIN)

    def distill(self) -> None:
        """Generate the LLM's outputs, and split the prompts by a hash of each, so that equal ones stay together."""
        settings, distilled = self.settings, self.output / "distilled.jsonl"
        if not distilled.is_file():
            self._check_prompts()
            write_json(self.output / RECORD, self._record)
            options = DistillSettings(
                prompt_column=settings.prompt_column, limit=settings.limit, batch_size=settings.batch_size,
                device=self.device, num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens,
                **self._data_options(),
            )  # fmt: skip
            distill(settings.llm, settings.prompts, distilled, options, progress=partial(self.progress, "distill"))
        if not all((self.output / f"{split}.jsonl").is_file() for split in SPLITS):
            self._split(distilled)
        write_json(self.output / RECORD, self._record)

    def _check_prompts(self) -> None:
        """Raise `ValueError` if prompts, with the longest output, exceed the max positions of one of the models."""
        settings, problems = self.settings, {}
        reading = DataSettings(
            prompt_column=settings.prompt_column, limit=settings.limit, skip_bad_rows=self.recipe.skip_bad_rows
        )
        prompts = load_prompts(settings.prompts, reading, number_rows=True)
        tokenizer, longest = load(AutoTokenizer, settings.llm), self.recipe.prompt_max_length
        for start in range(0, len(prompts), 1000):
            texts = prompts[start : start + 1000]["prompt"]
            for index, prompt in enumerate(encode_prompts(tokenizer, texts, partial(_token_ids, tokenizer)), start):
                length = len(prompt) if longest is None else min(len(prompt), longest)
                try:
                    check_length(self.config.encoder, length, settings.max_new_tokens)
                    self.config.check_length(length, settings.max_new_tokens)
                except ValueError as error:
                    problems[index] = f"is too long: {str(error).removesuffix('.')}"
        good_rows(settings.prompts, prompts[ROW][:], problems, reading.skip_bad_rows)

    def _split(self, distilled: Path) -> None:
        column = self.settings.prompt_column
        texts = sorted({_prompt_of(row, column) for row in parse_rows(distilled)}, key=_hash)
        if len(texts) < 3:
            raise ValueError(f"{self.settings.prompts} has {len(texts)} different prompts; a split needs at least 3.")
        held_out = max(min(self.settings.held_out, len(texts) // 10), 1)
        place = {text: "validation" if at < held_out else "test" for at, text in enumerate(texts[: 2 * held_out])}
        for split in SPLITS:
            with (
                atomic_write(self.output / f"{split}.jsonl") as temporary,
                temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,  # halves of surrogate pairs
            ):
                for row in parse_rows(distilled):
                    prompt = _prompt_of(row, column)
                    if place.get(prompt, "train") == split:
                        values = {**row, "prompt": conversation_in(prompt) or prompt}
                        file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def cut(self) -> None:
        """Make the SLM of some of the LLM's layers; its outputs choose them, if their number is given."""
        assert self.layers is not None
        if not (self.output / "slm" / "config.json").is_file():
            data = self.output / "train.jsonl" if isinstance(self.layers, int) else None
            options = CorpusSettings(
                target_column=[DistillSettings.column], prompt_max_length=self.recipe.prompt_max_length
            )
            progress = partial(self.progress, "cut")
            cut_checkpoint(self.settings.llm, self._slm, self.layers, data, options, overwrite=True, progress=progress)

    def build(self) -> None:
        """Build the checkpoint to train from the LLM's encoder and the SLM."""
        settings, start = self.settings, self.output / "start"
        if (start / "config.json").is_file():
            return
        options = BuildSettings(
            llm_tokenizer=settings.llm, slm_tokenizer=settings.slm_tokenizer, fusion=self.fusion,
            encoder_dtype=settings.encoder_dtype, max_new_tokens=settings.max_new_tokens,
        )  # fmt: skip
        built = build(settings.llm, self._slm, options)
        write_json(self.output / RECORD, self._record)
        remove_unfinished(start)
        with atomic_write(start) as folder:
            built.save_pretrained(folder)

    def encode(self) -> None:
        """Store the LLM's hidden states of the prompts to train and validate on."""
        data, states = [self.output / "train.jsonl", self.output / "validation.jsonl"], self.output / "states"
        if not is_complete(states):
            options = EncodeSettings(batch_size=self.settings.batch_size, device=self.device, **self._data_options())
            encode(self.output / "start", data, states, options, progress=partial(self.progress, "encode"))

    def train(self) -> None:
        """Train on the hidden states with the recipe, which is also written to the folder."""
        recipe = typed_recipe(self._recipe(), self.recipe, self.arguments)
        with atomic_write(self.output / "recipe.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(without_secrets(recipe), sort_keys=False), encoding="utf-8")
        if not (self.output / "model" / REPORT).is_file():
            train(recipe, quiet=self.quiet)

    def _paths(self) -> dict[str, str]:
        return {
            "model": f"{self.output}/start",
            "output_dir": f"{self.output}/model",
            "train_data": f"{self.output}/train.jsonl",
            "validation_data": f"{self.output}/validation.jsonl",
            "llm_states": f"{self.output}/states",
        }

    def _recipe(self) -> dict[str, Any]:
        shipped = files("modeling_llm2slm.configuration") / "recipes" / "speedup.yaml"
        # Fusion "cache" has no modules of its own.
        own: dict[str, Any] = {"learning_rate_mapping": {}} if self.fusion == "cache" else {}
        return load_recipe(str(shipped), {**own, **self._paths(), **with_current_names(self.settings.recipe)})

    def evaluate(self) -> None:
        """Compare the model with the LLM on the prompts that were held out for the test."""
        evaluation, trained = self.output / "evaluation.json", self.output / "model" / REPORT
        if evaluation.is_file() and evaluation.stat().st_mtime_ns >= trained.stat().st_mtime_ns:
            return
        model, llm = (
            TextToText.from_pretrained(path, device=self.device, prompt_max_length=self.recipe.prompt_max_length)
            for path in (self.output / "model", self.settings.llm)
        )
        options = EvaluateSettings(
            skip_bad_rows=self.recipe.skip_bad_rows, max_new_tokens=self.settings.max_new_tokens
        )
        write_json(evaluation, compare(model, llm, self.output / "test.jsonl", options))


def _token_ids(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    texts, options = write_conversations(tokenizer, prompts)
    return tokenizer(texts, verbose=False, **options)["input_ids"]


def _prompt_of(row: Mapping[str, Any], column: str) -> str:
    """Return the prompt of a row as a text, also if it is a conversation."""
    return read_conversations(row, sources_of([column], row), 0)[0][column]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _changed_field(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the first field that differs between two recipes, with its value in the first one."""
    name = next(name for name in {**now, **before} if before.get(name) != now.get(name))
    return name, before.get(name)


def _option(name: str, *values: Any) -> str:
    """Return an option of the command line with its value, if it is given one."""
    return " ".join([f"--{name.replace('_', '-')}", *map(str, values)])


def _command(*words: str, **options: Any) -> str:
    """Return a command as a shell takes it, without the options that are `None` or switched off."""
    line = ["llm2slm", *words]
    for name, value in options.items():
        if value is not None and value is not False:
            line += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(line)
