"""One interface over three kinds of checkpoint, so that they are trained, decoded and scored by the same code."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from ..configuration_llm2slm import check_length
from ..engines.graphs import is_exported
from .batching import BatchLimits, Draw, PromptTable, answer, is_sampled
from .parameters import count_parameters, decoding_modules


if TYPE_CHECKING:
    from ..states.store import StateStore


logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128


class TextToText:
    """
    A model that reads a prompt and writes an answer, with whatever turns texts into its tensors and back.

    Use [`TextToText.from_pretrained`]: it looks at the checkpoint and returns the subclass for an encoder-decoder
    (T5, or an LLM-to-SLM composite, exported or not) or for a decoder-only model (GPT-2).

    Args:
        model: The model, as loaded by its Auto class.
        processor: Its tokenizer; for a composite the [`LLM2SLMProcessor`].
        prompt_max_length: Prompts are cut to this many tokens (default: never).
        target_max_length: Answers are cut to this many tokens in training (default: never), and end there when
            they are generated.

    Attributes:
        tokenizer: The tokenizer of the answers.
        collator: Pads a list of features to a batch for a Trainer.
        states: The store that a composite without its LLM takes the LLM's states from.
    """

    states: StateStore | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        prompt_max_length: int | None = None,
        target_max_length: int | None = None,
    ):
        self.model = model
        self.processor = processor
        self.prompt_max_length = prompt_max_length
        self.target_max_length = target_max_length
        self.tokenizer: PreTrainedTokenizerBase = getattr(processor, "decoder_tokenizer", processor)

    @staticmethod
    def from_pretrained(
        path: str | Path,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        prompt_max_length: int | None = None,
        target_max_length: int | None = None,
        states: StateStore | None = None,
        quantize: str | None = None,
        keep_llm_dtype: bool = False,
    ) -> TextToText:
        """
        Loads a checkpoint of any of the three kinds.

        Args:
            path: A folder, or the name of a model on the Hub.
            dtype: The dtype to load the weights in (default: float32, whatever they were saved in; the LLM of a
                composite keeps a dtype of its own).
            device: Where to put the model (default: the CPU).
            prompt_max_length: See the class.
            target_max_length: See the class.
            states: Of a composite: a store to take the LLM's states from; the LLM itself is not loaded then.
            quantize: Keep the matrices in fewer bits, to answer with: see [`quantize`].
            keep_llm_dtype: Of a composite: its frozen LLM keeps the dtype that it was saved in also where that is the
                SLM's. One that trains is loaded in `dtype` like the SLM.

        Raises:
            ImportError: If it is an exported model, and its runtime is not installed, or the library that quantizes.
            OSError: If there is no such checkpoint, or if it is damaged or incomplete.
            ValueError: If the model is of a kind that does not write text, there is no such device, or the states are
                another LLM's.
        """
        if is_exported(path):
            if quantize is not None:
                raise ValueError(f"{path} is an exported model: export it with the weights that you want.")
            return ExportedTextToText.load(path, dtype, device, states, prompt_max_length, target_max_length)
        config = load(AutoConfig, path)
        encoder_decoder = getattr(config, "is_encoder_decoder", False)
        auto_class = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        if type(config) not in auto_class._model_mapping:
            raise ValueError(f"{path} is a {config.model_type} model, which does not turn a prompt into an answer.")
        processor = load(AutoProcessor if config.model_type == "llm2slm" else AutoTokenizer, path)
        if states is not None:
            if config.model_type != "llm2slm":
                raise ValueError(f"{path} is a {config.model_type} model, without an LLM beside it to have states of.")
            from ..states.without_llm import LLM2SLMWithoutLLM as auto_class

            states.check(path, config, processor.tokenizer)
        dtypes: dict[str, Any] = {"dtype": dtype or torch.float32}
        if keep_llm_dtype and config.model_type == "llm2slm":
            kept = config.encoder_dtype or config.dtype or torch.float32
            dtypes["encoder_dtype"] = str(kept if config.freeze_llm else dtypes["dtype"]).removeprefix("torch.")
        model = load_model(auto_class, path, **dtypes)
        kind = EncoderDecoderTextToText if encoder_decoder else DecoderOnlyTextToText
        model = _move(model, device or "cpu").eval()
        if quantize is not None:
            from ..engines.quantization import quantize as quantize_model

            quantize_model(model, quantize)
        text_to_text = kind(model, processor, prompt_max_length, target_max_length)
        text_to_text.states = states
        return text_to_text

    @property
    def collator(self) -> Any:
        return DataCollatorForSeq2Seq(self.tokenizer, model=self.model)

    def features(self, prompts: list[str], answers: list[str] | None = None) -> dict[str, list[list[int]]]:
        """
        Turns texts into token ids, without padding.

        Args:
            prompts: What the model reads.
            answers: What it shall write. None gives the features to generate from.

        Returns:
            `input_ids` and `attention_mask`, and `labels` if answers are given; each a list with one entry per prompt.
        """
        raise NotImplementedError

    def problems(self, features: dict[str, list[list[int]]]) -> list[str | None]:
        """What keeps each of some features, with labels, from being trained on: None where nothing does."""
        return [self._problem(*row) for row in zip(features["input_ids"], features["labels"], strict=True)]

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        return None

    def fingerprint(self) -> str:
        """A hash of everything that decides about features and their problems."""
        from ..states.fingerprints import tokenizer_fingerprint

        reader = getattr(self.processor, "tokenizer", self.processor)
        parts = [type(self).__name__, tokenizer_fingerprint(reader), tokenizer_fingerprint(self.tokenizer)]
        parts += [str(self.prompt_max_length), str(self.target_max_length), str(self._positions)]
        parts.append(str(getattr(self.model.config, "llm_positions", None)))
        return hashlib.sha256("|".join([*parts, str(self.states and self.states.description)]).encode()).hexdigest()

    def without_model(self) -> TextToText:
        """What makes the same features and finds the same problems, with no weights, to be sent to processes."""
        reader = copy.copy(self)
        reader.model = cast(PreTrainedModel, SimpleNamespace(config=self.model.config))
        return reader

    def generate(self, prompts: list[str], batch_size: int = 32, **generate_kwargs: Any) -> list[str]:
        """
        Writes the answers to prompts.

        Args:
            prompts: Any number of prompts; prompts of similar length go together, the order of the answers is kept. A
                prompt that occurs twice is answered once, unless answers are sampled.
            batch_size: How many prompts go through the model at once.
            generate_kwargs: Arguments of `model.generate()`, such as `num_beams` and `max_new_tokens`.
        """
        tokens = self.generate_tokens(prompts, batch_size, **generate_kwargs)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []

    def generate_tokens(self, prompts: list[str], batch_size: int = 32, **generate_kwargs: Any) -> list[list[int]]:
        """Like [`~TextToText.generate`], but returns the ids of each answer, the end token included."""
        if not prompts:
            return []
        features, generate_kwargs = self._prepare(prompts, generate_kwargs)
        table, limits = PromptTable(is_sampled(self, generate_kwargs)), BatchLimits(batch_size)
        table.add(prompts, lambda rows: [len(features["input_ids"][row]) for row in rows])

        def of_rows(rows: list[int]) -> dict[str, list[list[int]]]:
            return {name: [values[row] for row in rows] for name, values in features.items()}

        answers: dict[Draw, list[int]] = {}
        batches = table.batches(limits)
        # One thread: a model that is being trained may be in parts on several devices, which work in step.
        for draws, tokens in answer(self, table, batches, of_rows, limits, overlap=False, **generate_kwargs):
            answers.update(zip(draws, tokens, strict=True))
        return [answers[draw] for draw in table.draws]

    def stream(self, prompt: str, **generate_kwargs: Any) -> Iterator[str]:
        """Writes the answer to one prompt piece by piece, as `generate` finds it (greedy or sampled, not by beams)."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        features, generate_kwargs = self._prepare([prompt], generate_kwargs)
        inputs = self.read(features)
        errors: list[BaseException] = []

        def write() -> None:
            try:
                self.model.generate(**inputs, streamer=streamer, **generate_kwargs)
            except BaseException as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if errors:
            raise errors[0]

    def read(self, features: dict[str, list[list[int]]]) -> dict[str, Any]:
        """
        Reads a batch of prompts: all of `generate()` that comes before the answer.

        Args:
            features: What [`~TextToText.features`] returns, of one batch.

        Returns:
            Arguments of `model.generate()`: padded tensors `(B, N)`, and the encoder's output where there is one.
        """
        return dict(self._pad(features))

    def write(self, inputs: dict[str, Any], **generate_kwargs: Any) -> list[list[int]]:
        """The ids of each answer to what [`~TextToText.read`] returned, the end token included."""
        generated = self._answers(self.model.generate(**inputs, **generate_kwargs), inputs)
        return [self._until_end(tokens) for tokens in generated.tolist()]

    def with_limit(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate()` with a limit: the checkpoint's, where it has one, or `DEFAULT_MAX_NEW_TOKENS`."""
        defaults = getattr(self.model, "generation_config", None)
        own = self.target_max_length or getattr(defaults, "max_new_tokens", None)
        limit = own or min(DEFAULT_MAX_NEW_TOKENS, (self._positions or sys.maxsize) // 2)
        limits = {} if "max_length" in generate_kwargs else {"max_new_tokens": limit}
        return {**limits, **generate_kwargs}

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        """Raises `ValueError` where a prompt and an answer of these lengths need more positions than there are."""

    def position_problem(self, prompt_length: int, new_tokens: int) -> str | None:
        """What [`TextToText.check_positions`] raises, without its full stop, or `None`."""
        try:
            self.check_positions(prompt_length, new_tokens)
        except ValueError as error:
            return str(error).removesuffix(".")
        return None

    def _prepare(self, prompts: list[str], generate_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Features and arguments of `generate`, checked before any compute."""
        features, generate_kwargs = self.features(prompts), self.with_limit(generate_kwargs)
        lengths = [len(ids) for ids in features["input_ids"]]
        for length in {min(lengths), max(lengths)}:
            self.check_positions(length, generate_kwargs.get("max_new_tokens", 0))
        return features, generate_kwargs

    @property
    def _positions(self) -> int | None:
        """How many positions prompt and answer share, if any number limits them."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def parts(self) -> list[Part]:
        """What it consists of."""
        return [part_of("model", self.model, self.model.config)]

    def parameters(self) -> dict[str, int]:
        """The number of parameters: `total`, `trainable`, and `decode`, those that every answer token goes through."""
        return {
            "total": self.model.num_parameters(),
            "trainable": self.model.num_parameters(only_trainable=True),
            "decode": count_parameters(*self._decoding_modules()),
        }

    def _decoding_modules(self) -> list[Any]:
        return [self.model]

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """
        Saves the model and its processor, so that `from_pretrained` finds both.

        Args:
            path: The folder to write to.
            kwargs: Arguments of the model's `save_pretrained`; a composite has `include_llm` and `card`.
        """
        self.model.save_pretrained(path, **kwargs)
        self.processor.save_pretrained(path)

    def _pad(self, features: dict[str, list[list[int]]]) -> Any:
        """Pads features to tensors on the model's device, on the side to generate from."""
        reader = getattr(self.processor, "tokenizer", self.processor)
        inputs = reader.pad(features, padding_side=self._padding_side, return_tensors="pt")
        if self.states is not None:
            inputs["llm_hidden_states"] = self.states.batch(inputs["input_ids"], inputs["attention_mask"])
        return inputs.to(self.model.device)

    _padding_side = "right"

    def _answers(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Cuts off what `generate` returns before the answer."""
        raise NotImplementedError

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class EncoderDecoderTextToText(TextToText):
    """A T5, or any other encoder-decoder, or an LLM-to-SLM composite."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self._composite:  # the processor of a composite does its own cutting
            for name in ("prompt_max_length", "target_max_length"):
                if getattr(self, name) is None:
                    setattr(self, name, getattr(self.processor, name))
                setattr(self.processor, name, getattr(self, name))

    @property
    def _composite(self) -> bool:
        return self.processor is not self.tokenizer

    @property
    def collator(self) -> Any:
        if not self._composite:
            return super().collator
        from modeling_llm2slm import DataCollatorForLLM2SLM

        return DataCollatorForLLM2SLM(self.processor, model=self.model, states=self.states)

    def features(self, prompts: list[str], answers: list[str] | None = None) -> dict[str, list[list[int]]]:
        if self._composite:
            return dict(self.processor(text=list(prompts), text_target=None if answers is None else list(answers)))
        features = {"input_ids": self._encode("prompts", self.prompt_max_length, text=list(prompts))}
        features["attention_mask"] = [[1] * len(ids) for ids in features["input_ids"]]
        if answers is not None:
            features["labels"] = self._encode("answers", self.target_max_length, text_target=list(answers))
        return features

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        if not self._composite:
            problem = self.position_problem(len(input_ids), len(labels))
            return problem and f"is too long: {problem}"
        if not input_ids:
            return "has an empty prompt"
        if self.states is not None and input_ids not in self.states:
            return (
                f"is not in {self.states.path}, which was made of other data or with another prompt_max_length: "
                "encode all data that is trained on, with that of the recipe"
            )
        llm_positions = self.model.config.llm_positions
        if llm_positions is not None and len(input_ids) > llm_positions:
            return f"has a prompt of {len(input_ids)} tokens, but the LLM has {llm_positions} positions"
        if not self.model.config.fits(len(input_ids), len(labels)):
            return f"has {len(input_ids) + len(labels)} tokens, but the SLM has {self._positions} positions"
        return None

    def _encode(self, what: str, max_length: int | None, **texts: list[str]) -> list[list[int]]:
        ids = self.processor(**texts, verbose=False)["input_ids"]
        if not _warn_of_cut(what, ids, max_length):
            return ids
        return self.processor(**texts, truncation=True, max_length=max_length)["input_ids"]

    @torch.no_grad()
    def read(self, features: dict[str, list[list[int]]]) -> dict[str, Any]:
        # Token ids stay with the states: some logits processors, and an assistant, look at the prompt.
        inputs = super().read(features)
        if self._composite:
            return {**inputs, "encoder_outputs": self.model.encode_prompt(**inputs)}
        return {**inputs, "encoder_outputs": self.model.get_encoder()(**inputs, return_dict=True)}

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        if not self._composite:
            check_length(self.model.config, prompt_length, new_tokens)
            return
        if not prompt_length:
            raise ValueError("The prompt is empty.")
        self.model.config.check_llm_length(prompt_length)
        self.model.config.check_length(prompt_length, new_tokens)

    def _answers(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        return generated[:, 1:]  # the start token

    def parts(self) -> list[Part]:
        return composite_parts(self.model) if self._composite else super().parts()

    def _decoding_modules(self) -> list[Any]:
        return decoding_modules(self.model.decoder if self._composite else self.model)


def composite_parts(model: Any) -> list[Part]:
    """What a composite consists of."""
    encoder, config = model.encoder, model.config
    return [
        part_of("LLM", encoder.llm, config.encoder),
        *(part_of(name.replace("_", " "), module) for name, module in encoder.new_modules().items()),
        part_of("SLM", model.decoder, config.decoder),
    ]


class ExportedTextToText(EncoderDecoderTextToText):
    """An LLM-to-SLM composite that `llm2slm export` wrote for a runtime other than PyTorch."""

    @classmethod
    def load(
        cls, path: str | Path, dtype: Any, device: Any, states: StateStore | None, *lengths: int | None
    ) -> ExportedTextToText:
        """As [`TextToText.from_pretrained`]."""
        from ..engines.exported import ExportedLLM2SLM

        if torch.device(device or "cpu").type != "cpu":
            raise ValueError(f"{path} is an exported model, which runs on the CPU, not on {device}. Leave it out.")
        if states is not None or dtype not in (None, torch.float32):
            raise ValueError(f"{path} is an exported model, with all of its weights as they are.")
        with one_sentence(path):
            model = ExportedLLM2SLM.from_pretrained(path)
        return cls(model, load(AutoProcessor, path), *lengths)

    def parts(self) -> list[Part]:
        config = self.model.config
        configs = {"LLM": config.encoder, "SLM": config.decoder}
        weights = self.model.details["weights"]
        return [
            Part(name, configs.get(name), count, weights) for name, count in self.model.details["parameters"].items()
        ]

    def parameters(self) -> dict[str, int]:
        total = sum(part.parameters for part in self.parts())
        return {"total": total, "trainable": 0, "decode": self.model.details["decode"]}

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        raise ValueError("An exported model is not saved again: copy its folder.")


@dataclass
class DataCollatorForTargets:
    """
    Batches for a decoder-only model, with logits for the answers only, which on short texts are most of the work.

    Padding goes on the left, so that the answers of a batch end together, and `logits_to_keep` counts back from there.

    Args:
        tokenizer: Pads.

    Returns (of a call):
        `input_ids`, `attention_mask` and `position_ids` `(B, N)`, `labels` `(B, K)`, and K as `logits_to_keep`: the
        length of the longest answer and one more, as the separator predicts the first token.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in features]
        batch = dict(self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt", verbose=False))
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        answers = [[label for label in row["labels"] if label != -100] for row in features]
        kept = 1 + max(map(len, answers))
        batch["labels"] = torch.tensor([[-100] * (kept - len(answer)) + answer for answer in answers])
        return {**batch, "logits_to_keep": kept}


class DecoderOnlyTextToText(TextToText):
    """
    A GPT-2, or any other decoder-only model, on sequences of the form `[prompt] [separator] [answer] [end]`.

    The separator is the tokenizer's start token where it has one, else its end token. The loss counts the answer and
    its end only. Prompts are padded on the left to generate from.
    """

    _padding_side = "left"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.tokenizer.pad_token_id is None:  # every pad is masked, so any id will do
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def collator(self) -> Any:
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return super().collator
        return DataCollatorForTargets(self.tokenizer)

    def features(self, prompts: list[str], answers: list[str] | None = None) -> dict[str, list[list[int]]]:
        separator, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        separator = end if separator is None else separator
        inputs = [ids + [separator] for ids in self._ids("prompts", prompts, self.prompt_max_length)]
        features = {"input_ids": inputs}
        if answers is not None:
            room = None if self.target_max_length is None else self.target_max_length - 1
            targets = [ids + [end] for ids in self._ids("answers", answers, room)]
            pairs = list(zip(inputs, targets, strict=True))
            features["input_ids"] = [prompt + answer for prompt, answer in pairs]
            features["labels"] = [[-100] * len(prompt) + answer for prompt, answer in pairs]
        features["attention_mask"] = [[1] * len(ids) for ids in features["input_ids"]]
        return features

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        if self._positions is None or len(input_ids) <= self._positions:
            return None
        return f"has {len(input_ids)} tokens, but the model has {self._positions} positions"

    def _ids(self, what: str, texts: list[str], max_length: int | None) -> list[list[int]]:
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        _warn_of_cut(what, ids, max_length)
        return [row[:max_length] for row in ids]

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        length = prompt_length + new_tokens
        if self._positions is not None and length > self._positions:
            raise ValueError(
                f"Prompt and answer are {length} tokens together, but the model has {self._positions} positions. "
                "Set prompt_max_length, target_max_length or max_new_tokens."
            )

    def _answers(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        return generated[:, inputs["input_ids"].shape[1] :]


def _warn_of_cut(what: str, rows: list[list[int]], max_length: int | None) -> int:
    """Says how many texts will be cut, and returns how many."""
    cut = 0 if max_length is None else sum(len(row) > max_length for row in rows)
    if cut:
        logger.warning(f"{cut} of {len(rows)} {what} are longer than {max_length} tokens and were cut.")
    return cut


@dataclass
class Part:
    """A part of a model: its config, if it has one of its own, and the number and type of its weights."""

    name: str
    config: Any
    parameters: int
    dtype: str


def part_of(name: str, module: torch.nn.Module, config: Any = None) -> Part:
    """A part that is a module."""
    tensors = list(module.parameters())
    return Part(name, config, sum(tensor.numel() for tensor in tensors), str(tensors[0].dtype).removeprefix("torch."))


def _move(model: Any, device: str | torch.device) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such name; torch built without it
        raise ValueError(f"The model cannot be put on {device}: {str(error).splitlines()[0]}") from error


def load_model(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """Loads a model whole: from safetensors only, and a weight that is missing is an `OSError`."""
    model, loading = load(auto_class, path, output_loading_info=True, use_safetensors=True, **kwargs)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise OSError(f"{path} is incomplete: {len(missing)} weights are missing, {missing[0]} among them.")
    return model


def load(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """Calls `auto_class.from_pretrained` and turns whatever goes wrong into an `OSError` of one sentence."""
    with one_sentence(path):  # without this answer, transformers would ask at the terminal whether code may be run
        return auto_class.from_pretrained(path, **{"trust_remote_code": False, **kwargs})


@contextmanager
def one_sentence(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong with a checkpoint into an `OSError` of one sentence."""
    try:
        yield
    except Exception as error:  # a damaged checkpoint raises a different class for each file and format
        raise OSError(f"{path} cannot be loaded: {_reason(str(path), error)}") from error


def _reason(path: str, error: Exception) -> str:
    """What is wrong, in a line. Where a folder is not there, transformers speaks of its name, or of the Hub alone."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(path).exists():
        return reason
    if path.endswith(".json"):
        return "there is no such file"
    is_folder = path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    return "there is no such folder" if is_folder else f"there is no such folder, and on the Hub: {reason}"
