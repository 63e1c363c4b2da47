"""From an LLM and prompts to a model that can be served: distill, build, encode, train, evaluate, each stage once."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoTokenizer

from ..configuration_llm2slm import LLM2SLMConfig, check_length
from ..conversion.build import build, part_config
from ..data.files import atomic_write, remove_unfinished
from ..data.loading import ROW, check_any_left, load_rows, parse_lines, report_bad_rows
from ..data.records import without_secrets, write_json
from ..evaluation.agreement import compare
from ..inference.text_to_text import TextToText, load
from ..states.encoding import encode
from ..states.fingerprints import checkpoint_fingerprint
from ..states.store import is_complete
from ..training.distillation import distill
from ..training.training import last_checkpoint, load_recipe, parse_recipe, train


SPLITS = ("train", "validation", "test")
Progress = Callable[[str, int, int], None]
_OF_DISTILLING = ("llm", "prompts", "prompt_column", "limit", "held_out", "num_beams", "max_new_tokens")
_OF_BUILDING = ("llm", "llm_sha256", "slm", "slm_tokenizer", "fusion", "encoder_dtype", "max_new_tokens")
_RESULTS = ("distilled.jsonl", *(f"{split}.jsonl" for split in SPLITS), "start", "states", "model", "evaluation.json")
_CONTENTS = {"llm_sha256": "llm", "prompts_sha256": "prompts"}  # of those that lie on this machine


@dataclass
class SpeedupSettings:
    """
    What a run is of; all of it but tokens is kept in `speedup.json`. A run may be repeated with other settings for
    stages that are not done yet, and is refused with others for those that are.

    Args:
        llm: The LLM with its decoder, a folder or a name on the Hub.
        prompts: Prompts without references, see [`load_prompts`].
        slm: The model that is to write: a folder, a name on the Hub, or a config file for random weights.
        slm_tokenizer: Its tokenizer (default: its own; of a config file, the LLM's).
        prompt_column: The column that holds what the model reads.
        limit: Use only this many prompts, from the top.
        held_out: The number of prompts held out for validation, and as many for the test; at most a tenth each.
        num_beams: Of the LLM's answers.
        max_new_tokens: The longest answer, in tokens of either model.
        batch_size: Prompts that the LLM reads and answers at once.
        fusion: See [`LLM2SLMConfig`].
        encoder_dtype: The LLM's dtype in the composite.
        recipe: Fields of a recipe in place of those of `recipes/speedup.yaml`, such as `num_train_epochs`, but for the
            paths. Its `prompt_max_length` and `skip_bad_rows` hold for all stages.
    """

    llm: str
    prompts: str
    slm: str = "openai-community/gpt2"
    slm_tokenizer: str | None = None
    prompt_column: str = "prompt"
    limit: int | None = None
    held_out: int = 500
    num_beams: int = 4
    max_new_tokens: int = 128
    batch_size: int = 32
    fusion: str = "add"
    encoder_dtype: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


class Speedup:
    """
    A run in a folder. Every stage is skipped where its result lies there, and goes on where it was stopped.

    Args:
        settings: What the run is of.
        output: The folder: `distilled.jsonl`, its splits, `start`, `states`, `model` (the result) and
            `evaluation.json`.
        device: Where the LLM reads and writes; training takes the accelerator that is there.
        progress: Called with the stage and the numbers of prompts done and in all.

    Raises:
        ValueError: If the folder holds a run with other settings, a field of the recipe is wrong or a path, or the two
            models do not go together.
        OSError: If one of the models cannot be found.
    """

    def __init__(
        self,
        settings: SpeedupSettings,
        output: str | Path,
        device: str = "cpu",
        progress: Progress = lambda stage, done, total: None,
    ):
        self.settings = settings
        self.output = Path(output)
        self.device = device
        self.progress = progress
        self._check()

    def _check(self) -> None:
        """Whatever would stop a stage is better found before hours of the stages before it."""
        path, kept = self.output / "speedup.json", self._kept  # of the prompts as they are before the LLM answers them
        if path.is_file():
            try:
                begun = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is cut or broken ({error}). Choose another folder with --output.") from error
            before, now = self._fixed(begun), self._fixed(kept)
            changed = [name for name in now if before.get(name) != now[name]]
            if changed and changed[0] in _CONTENTS:
                what = getattr(self.settings, _CONTENTS[changed[0]])
                raise ValueError(
                    f"{what} has changed since {self.output} was begun. Choose another folder with --output, or bring "
                    "back what was there."
                )
            if changed:
                raise ValueError(
                    f"{self.output} was begun with another {changed[0]} ({before.get(changed[0])!r}). Repeat its "
                    "settings, or choose another folder with --output."
                )
        elif foreign := [name for name in _RESULTS if (self.output / name).exists()]:
            raise ValueError(
                f"{self.output} has {foreign[0]}, which no speed-up made (there is no {path.name}). Choose another "
                "folder with --output."
            )
        filled_in = [name for name in self._paths() if name in self.settings.recipe]
        if filled_in:
            raise ValueError(
                f"{filled_in[0]} is what a speed-up fills in itself: leave it out, or train by a recipe of your own "
                "(`llm2slm train`)."
            )
        if "prompt_column" in self.settings.recipe:
            raise ValueError("A speed-up has one column of prompts for all stages: name it with --prompt-column.")
        self.recipe, _ = parse_recipe(self._recipe())
        llm, tokenizer = load(AutoConfig, self.settings.llm), self.settings.slm_tokenizer or self.settings.llm
        self.config = LLM2SLMConfig(encoder=llm, decoder=part_config(self.settings.slm, tokenizer))

    @cached_property
    def _kept(self) -> dict[str, Any]:
        prompts, settings = Path(self.settings.prompts).expanduser(), asdict(self.settings)
        if prompts.is_file():
            with prompts.open("rb") as file:
                settings["prompts_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if Path(self.settings.llm).is_dir():
            settings["llm_sha256"] = checkpoint_fingerprint(self.settings.llm)
        return json.loads(json.dumps({**settings, "recipe": without_secrets(self.settings.recipe)}))

    def _fixed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """
        Those of some settings that a stage which is done, or a training that has begun, went by. A recipe's
        `skip_bad_rows` may always change.
        """
        recipe = {name: value for name, value in settings["recipe"].items() if name != "skip_bad_rows"}
        fixed: dict[str, Any] = {}
        if any((self.output / name).exists() for name in ("distilled.jsonl.part", *_RESULTS) if name != "start"):
            fixed |= {name: settings.get(name) for name in (*_OF_DISTILLING, *_CONTENTS)}
            fixed["prompt_max_length"] = recipe.get("prompt_max_length")
        if (self.output / "start" / "config.json").is_file():
            fixed |= {name: settings.get(name) for name in _OF_BUILDING}
        if (self.output / "model" / "training.json").is_file() or last_checkpoint(self.output / "model"):
            fixed["recipe"] = recipe
        return fixed

    def stages(self) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Each stage by its name, in order: the command that does the same, and what does it here."""
        settings, output, data = self.settings, self.output, self._data_options()
        llm, split = settings.llm, {name: f"{output}/{name}.jsonl" for name in SPLITS}
        reading = {**data, "batch_size": settings.batch_size, "device": self.device}
        answering = {"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
        return {
            "distill": (
                _command(
                    "distill", llm, settings.prompts, output=f"{output}/distilled.jsonl",
                    prompt_column=settings.prompt_column, limit=settings.limit, **answering, **reading,
                ),
                self.distill,
            ),
            "build": (
                _command(
                    "build", f"{output}/start", llm=llm, slm=settings.slm, slm_tokenizer=settings.slm_tokenizer,
                    fusion=settings.fusion, encoder_dtype=settings.encoder_dtype,
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

    def _data_options(self) -> dict[str, Any]:
        """What the recipe says of the data, which holds for every stage that reads some."""
        return {"prompt_max_length": self.recipe.prompt_max_length, "skip_bad_rows": self.recipe.skip_bad_rows}

    def run(self, announce: Callable[[str, str], None] = lambda stage, command: None) -> dict[str, Any]:
        """Runs all stages that are not done, and returns the evaluation, as [`compare`] does."""
        for stage, (command, work) in self.stages().items():
            announce(stage, command)
            work()
        return json.loads((self.output / "evaluation.json").read_text(encoding="utf-8"))

    def distill(self) -> None:
        """Has the LLM answer the prompts, and splits them by a hash of each, so that equal ones stay together."""
        settings, distilled = self.settings, self.output / "distilled.jsonl"
        if not distilled.is_file():
            self._check_prompts()
            write_json(self.output / "speedup.json", self._kept)
            distill(
                settings.llm, settings.prompts, distilled, settings.prompt_column, limit=settings.limit,
                batch_size=settings.batch_size, device=self.device, num_beams=settings.num_beams,
                max_new_tokens=settings.max_new_tokens, **self._data_options(),
                progress=lambda done, total: self.progress("distill", done, total),
            )  # fmt: skip
        if not all((self.output / f"{split}.jsonl").is_file() for split in SPLITS):
            self._split(distilled)
        write_json(self.output / "speedup.json", self._kept)

    def _check_prompts(self) -> None:
        """Raises `ValueError` where the models have no room for some of the prompts and their longest answers."""
        settings, bad = self.settings, {}
        rows = load_rows(
            settings.prompts, settings.prompt_column, limit=settings.limit, skip_bad_rows=self.recipe.skip_bad_rows,
            number_rows=True,
        )  # fmt: skip
        tokenizer, longest = load(AutoTokenizer, settings.llm), self.recipe.prompt_max_length
        for batch in rows.select_columns([ROW, settings.prompt_column]).iter(1000):
            ids = tokenizer(batch[settings.prompt_column], verbose=False)["input_ids"]
            for number, prompt in zip(batch[ROW], ids, strict=True):
                length = len(prompt) if longest is None else min(len(prompt), longest)
                try:
                    check_length(self.config.encoder, length, settings.max_new_tokens)
                    self.config.check_length(length, settings.max_new_tokens)
                except ValueError as error:
                    bad[number] = f"row {number}: {str(error).removesuffix('.')}"
        check_any_left(settings.prompts, bad, len(rows))
        if bad:
            report_bad_rows(settings.prompts, bad, self.recipe.skip_bad_rows)

    def _split(self, distilled: Path) -> None:
        column = self.settings.prompt_column
        texts = sorted({row[column] for row in parse_lines(distilled, None)}, key=_hash)
        if len(texts) < 3:
            raise ValueError(f"{self.settings.prompts} has {len(texts)} different prompts; 3 are the least to split.")
        held_out = max(min(self.settings.held_out, len(texts) // 10), 1)
        place = {text: "validation" if at < held_out else "test" for at, text in enumerate(texts[: 2 * held_out])}
        for split in SPLITS:
            with (
                atomic_write(self.output / f"{split}.jsonl") as temporary,
                temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,  # halves of surrogate pairs
            ):
                for row in parse_lines(distilled, None):
                    if place.get(row[column], "train") == split:
                        file.write(json.dumps({**row, "prompt": row[column]}, ensure_ascii=False) + "\n")

    def build(self) -> None:
        """Puts the LLM's encoder and the SLM together."""
        settings, start = self.settings, self.output / "start"
        if (start / "config.json").is_file():
            return
        dtype: dict[str, Any] = {} if settings.encoder_dtype is None else {"encoder_dtype": settings.encoder_dtype}
        composite = build(
            settings.llm, settings.slm, settings.llm, settings.slm_tokenizer, fusion=settings.fusion,
            max_new_tokens=settings.max_new_tokens, **dtype,
        )  # fmt: skip
        write_json(self.output / "speedup.json", self._kept)
        remove_unfinished(start)
        with atomic_write(start) as folder:
            composite.save_pretrained(folder)

    def encode(self) -> None:
        """Stores the LLM's states of the prompts that are trained and validated on."""
        data, states = [self.output / "train.jsonl", self.output / "validation.jsonl"], self.output / "states"
        if not is_complete(states):
            encode(
                self.output / "start", data, states, batch_size=self.settings.batch_size, device=self.device,
                progress=lambda done, total: self.progress("encode", done, total), **self._data_options(),
            )  # fmt: skip

    def train(self) -> None:
        """Trains on the states, by the recipe that is written to the folder."""
        recipe = self._recipe()
        with atomic_write(self.output / "recipe.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(without_secrets(recipe), sort_keys=False), encoding="utf-8")
        if not (self.output / "model" / "training.json").is_file():
            train(recipe)

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
        return load_recipe(str(shipped), {**self._paths(), **self.settings.recipe})

    def evaluate(self) -> None:
        """Compares the model with the LLM on the prompts that were held out."""
        evaluation, trained = self.output / "evaluation.json", self.output / "model" / "training.json"
        if evaluation.is_file() and evaluation.stat().st_mtime_ns >= trained.stat().st_mtime_ns:
            return
        model, llm = (
            TextToText.from_pretrained(path, device=self.device, prompt_max_length=self.recipe.prompt_max_length)
            for path in (self.output / "model", self.settings.llm)
        )
        result = compare(
            model, llm, self.output / "test.jsonl", skip_bad_rows=self.recipe.skip_bad_rows, num_beams=1,
            max_new_tokens=self.settings.max_new_tokens,
        )  # fmt: skip
        write_json(evaluation, result)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _command(*words: str, **options: Any) -> str:
    """A command as a shell takes it, without the options that are None or switched off."""
    line = ["llm2slm", *words]
    for name, value in options.items():
        if value is not None and value is not False:
            line += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(line)
