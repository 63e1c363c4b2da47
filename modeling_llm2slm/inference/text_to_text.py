"""Text in, text out: one interface over every kind of checkpoint, so that the same code trains and scores all."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from ..configuration_llm2slm import check_length
from ..data.collator import DataCollatorForLLM2SLM
from ..data.order import seeded
from ..states.fingerprints import tokenizer_fingerprint
from ..states.store import StateStore
from .batching import BatchLimits, OutputId, PromptTable, can_overlap, one_ahead, prompts_of, take_rows
from .engine import LoadOptions, engine_of
from .parts import Part, composite_parts, count_parameters, decoding_modules, part_of


logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128
Features = dict[str, list[list[int]]]


class TextToText:
    """
    A model that reads a prompt and generates text, together with its tokenizers.

    [`TextToText.from_pretrained`] loads any checkpoint: an LLM-to-SLM model, exported or not, another encoder-decoder
    (T5) or a decoder-only model (GPT-2). It returns the subclass that fits.

    Example:

    ```python
    from modeling_llm2slm.inference.text_to_text import TextToText

    model = TextToText.from_pretrained("runs/model")
    model.generate(["A man sleeps on a sofa.", "Two dogs run."], max_new_tokens=32)  # a list of two texts
    for piece in model.stream("A man sleeps on a sofa."):
        print(piece, end="", flush=True)
    ```

    Args:
        model: The model, as its Auto class loads it.
        processor: Its tokenizer; for an LLM-to-SLM model the [`LLM2SLMProcessor`].
        prompt_max_length: Truncate prompts to this many tokens. Default: never.
        target_max_length: Truncate targets to this many tokens in training, and limit outputs to as many. Default:
            never.

    Attributes:
        tokenizer: The tokenizer of targets and outputs.
        states: The store that replaces the LLM, if the model was loaded without it.
    """

    states: StateStore | None = None
    _padding_side = "right"

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
        Load a checkpoint of any kind, with the engine that it was written for.

        Args:
            path: A folder, or the name of a model on the Hub.
            dtype: dtype of the weights. Default: float32, whatever dtype they were saved in; the LLM of an LLM-to-SLM
                model keeps a dtype of its own.
            device: Where to put the model. Default: the CPU.
            prompt_max_length: Truncate prompts to this many tokens. Default: the checkpoint's limit, or never.
            target_max_length: Truncate targets, and limit outputs, to this many tokens. Default: likewise.
            states: For an LLM-to-SLM model: a store of the LLM's hidden states. The LLM itself is not loaded.
            quantize: Quantize the weights: `"int8"` or `"nf4"`, see [`quantize`]. The model can then only generate.
            keep_llm_dtype: For an LLM-to-SLM model: a frozen LLM keeps the dtype it was saved in, also where that is
                the SLM's dtype. An LLM that trains is loaded in `dtype`, like the SLM.

        Raises:
            ImportError: If the checkpoint's engine, or the library that quantizes, is not installed.
            OSError: If the checkpoint does not exist, is damaged or is incomplete.
            ValueError: If the model does not generate text, the device does not exist, or the store belongs to another
                LLM.
        """
        options = LoadOptions(
            dtype=dtype,
            device=device,
            prompt_max_length=prompt_max_length,
            target_max_length=target_max_length,
            states=states,
            quantize=quantize,
            keep_llm_dtype=keep_llm_dtype,
        )
        return engine_of(path).load(path, options)

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """
        Save the model and its processor, so that `from_pretrained` finds both.

        Args:
            path: The folder to write to.
            kwargs: Arguments of the model's `save_pretrained`; an LLM-to-SLM model has `include_llm` and `card`.
        """
        self.model.save_pretrained(path, **kwargs)
        self.processor.save_pretrained(path)

    def generate(self, prompts: list[str], batch_size: int = 32, **generate_kwargs: Any) -> list[str]:
        """
        Generate text for prompts.

        Args:
            prompts: Any number of prompts. Prompts of similar length share a batch; a prompt that occurs twice is
                generated for once, unless outputs are sampled.
            batch_size: Prompts per batch.
            generate_kwargs: Arguments of `model.generate()`, such as `num_beams` and `max_new_tokens`.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ValueError: If a prompt is empty, or a prompt and its output do not fit into the model's positions. This is
                checked before any compute.
        """
        tokens = self.generate_tokens(prompts, batch_size, **generate_kwargs)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []

    def generate_tokens(self, prompts: list[str], batch_size: int = 32, **generate_kwargs: Any) -> list[list[int]]:
        """Generate like [`~TextToText.generate`], but return the token ids of each output, the end token included."""
        if not prompts:
            return []
        features, generate_kwargs = self._prepare(prompts, generate_kwargs)
        table, limits = PromptTable(is_sampled(self, generate_kwargs)), BatchLimits(batch_size)
        table.add(prompts, lambda rows: [len(features["input_ids"][row]) for row in rows])

        def features_of(rows: list[int]) -> Features:
            return {name: [values[row] for row in rows] for name, values in features.items()}

        outputs: dict[OutputId, list[int]] = {}
        # No thread that reads ahead: the parts of a model in training may be on several devices, which work in step.
        batches = self.generate_batches(
            table, table.batches(limits), features_of, limits, overlap=False, **generate_kwargs
        )
        for ids, tokens in batches:
            outputs.update(zip(ids, tokens, strict=True))
        return [outputs[output] for output in table.outputs]

    def generate_batches(
        self,
        table: PromptTable,
        batches: Sequence[Sequence[OutputId]],
        features_of: Callable[[list[int]], Features],
        limits: BatchLimits,
        *,
        overlap: bool | None = None,
        seed: int | None = None,
        known: Collection[str] = (),
        **generate_kwargs: Any,
    ) -> Iterator[tuple[Sequence[OutputId], list[list[int]]]]:
        """
        Generate batch by batch.

        Args:
            table: The prompts.
            batches: The outputs to generate, see [`PromptTable.batches`].
            features_of: Returns the features, see [`~TextToText.features`], of rows given by their numbers.
            limits: Size of a batch of outputs.
            overlap: Read a batch in a thread while the one before is generated. Outputs do not change. Default: if the
                model is on an accelerator, or leaves a core of the CPU free.
            seed: Seed of sampling. Outputs repeat, also those of an interrupted run.
            known: Keys of outputs to leave out.
            generate_kwargs: Arguments of `model.generate()`.

        Yields:
            The ids of some outputs, and the token ids of each, the end token included.
        """

        def read(batch: Sequence[OutputId]) -> dict[str, Any]:
            return self.read(features_of([table.rows[number] for number in prompts_of(batch)]))

        if overlap is None:
            overlap = can_overlap(getattr(self.model, "device", None))
        for batch, inputs in zip(batches, one_ahead(read, batches, overlap), strict=True):
            index = {number: index for index, number in enumerate(prompts_of(batch))}
            for piece in table.pieces(batch, limits, known):
                if seed is not None:
                    # Seeded by the row, so that the rest of an interrupted run is sampled as without interruption.
                    number, sample = piece[0]
                    torch.manual_seed(seeded(seed, table.rows[number], sample).initial_seed())
                chosen = take_rows(inputs, [index[number] for number, _ in piece])
                yield piece, self.write(chosen, **generate_kwargs)

    def stream(self, prompt: str, **generate_kwargs: Any) -> Iterator[str]:
        """
        Generate for one prompt, and yield the text piece by piece.

        Args:
            prompt: The prompt.
            generate_kwargs: As for [`~TextToText.generate`]. Beam search (`num_beams` above 1) cannot stream.
        """
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

    def read(self, features: Features) -> dict[str, Any]:
        """
        Read a batch of prompts: everything in `generate()` that comes before the first token.

        Args:
            features: The result of [`~TextToText.features`] for one batch.

        Returns:
            Arguments of `model.generate()`: padded tensors `(B, N)`, and the encoder's output if there is an encoder.
        """
        return dict(self.pad(features))

    def write(self, inputs: dict[str, Any], **generate_kwargs: Any) -> list[list[int]]:
        """Generate from the result of [`~TextToText.read`]; return the token ids of each output with its end token."""
        generated = self._outputs(self.model.generate(**inputs, **generate_kwargs), inputs)
        return [self._until_end(tokens) for tokens in generated.tolist()]

    def features(self, prompts: list[str], targets: list[str] | None = None) -> Features:
        """
        Turn texts into token ids, without padding.

        Args:
            prompts: The prompts.
            targets: The texts to train on. `None` gives features to generate from.

        Returns:
            `input_ids` and `attention_mask`, and `labels` if there are targets; each a list with one entry per prompt.
        """
        raise NotImplementedError

    def problems(self, features: Features) -> list[str | None]:
        """Return why the model cannot be trained on each of some features with labels; `None` where it can."""
        return [self._problem(*row) for row in zip(features["input_ids"], features["labels"], strict=True)]

    @property
    def collator(self) -> Any:
        """What pads a list of features to a batch for a Trainer."""
        return DataCollatorForSeq2Seq(self.tokenizer, model=self.model)

    def fingerprint(self) -> str:
        """Return a hash of everything that features and their problems depend on."""
        reader = getattr(self.processor, "tokenizer", self.processor)
        parts = [type(self).__name__, tokenizer_fingerprint(reader), tokenizer_fingerprint(self.tokenizer)]
        parts += [str(self.prompt_max_length), str(self.target_max_length), str(self._positions)]
        parts.append(str(getattr(self.model.config, "llm_positions", None)))
        return hashlib.sha256("|".join([*parts, str(self.states and self.states.description)]).encode()).hexdigest()

    def without_model(self) -> TextToText:
        """Return a copy without weights that gives the same features and problems, to be sent to other processes."""
        reader = copy.copy(self)
        reader.model = cast(PreTrainedModel, SimpleNamespace(config=self.model.config))
        return reader

    def with_limit(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        Return arguments of `generate()` that limit the output.

        The limit is, in this order: the one in `generate_kwargs`, `target_max_length`, the checkpoint's own, or
        `DEFAULT_MAX_NEW_TOKENS`, but at most half of the model's positions.
        """
        defaults = getattr(self.model, "generation_config", None)
        own = self.target_max_length or getattr(defaults, "max_new_tokens", None)
        limit = own or min(DEFAULT_MAX_NEW_TOKENS, (self._positions or sys.maxsize) // 2)
        limits = {} if "max_length" in generate_kwargs else {"max_new_tokens": limit}
        return {**limits, **generate_kwargs}

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        """Raise `ValueError` if a prompt and an output of these lengths need more positions than the model has."""

    def position_problem(self, prompt_length: int, new_tokens: int) -> str | None:
        """Return the message of [`~TextToText.check_positions`] without its full stop, or `None`."""
        try:
            self.check_positions(prompt_length, new_tokens)
        except ValueError as error:
            return str(error).removesuffix(".")
        return None

    def parts(self) -> list[Part]:
        """Return the parts of the model, with their parameters and dtypes."""
        return [part_of("model", self.model, self.model.config)]

    def parameters(self) -> dict[str, int]:
        """Count parameters: `total`, `trainable`, and `decode`, those that every output token passes through."""
        return {
            "total": self.model.num_parameters(),
            "trainable": self.model.num_parameters(only_trainable=True),
            "decode": count_parameters(*decoding_modules(self._generating_model)),
        }

    def _prepare(self, prompts: list[str], generate_kwargs: dict[str, Any]) -> tuple[Features, dict[str, Any]]:
        """Return features and arguments of `generate()`, checked before any compute."""
        features, generate_kwargs = self.features(prompts), self.with_limit(generate_kwargs)
        lengths = [len(ids) for ids in features["input_ids"]]
        for length in {min(lengths), max(lengths)}:
            self.check_positions(length, generate_kwargs.get("max_new_tokens", 0))
        return features, generate_kwargs

    def pad(self, features: Features) -> Any:
        """Pad features to tensors on the model's device, on the side that suits generation."""
        reader = getattr(self.processor, "tokenizer", self.processor)
        return reader.pad(features, padding_side=self._padding_side, return_tensors="pt").to(self.model.device)

    @property
    def _generating_model(self) -> Any:
        """The model that generates tokens: all of it, or the SLM of an LLM-to-SLM model."""
        return self.model

    @property
    def _positions(self) -> int | None:
        """The number of positions that prompt and output share; `None` without a limit."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        return None

    def _outputs(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Cut off what `generate()` returns before the output."""
        raise NotImplementedError

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class EncoderDecoderTextToText(TextToText):
    """An encoder-decoder model, such as a T5."""

    def features(self, prompts: list[str], targets: list[str] | None = None) -> Features:
        features = {"input_ids": self._encode("prompts", self.prompt_max_length, text=list(prompts))}
        features["attention_mask"] = [[1] * len(ids) for ids in features["input_ids"]]
        if targets is not None:
            features["labels"] = self._encode("targets", self.target_max_length, text_target=list(targets))
        return features

    @torch.no_grad()
    def read(self, features: Features) -> dict[str, Any]:
        # Token ids stay in the inputs: some logits processors, and an assistant model, read the prompt.
        inputs = super().read(features)
        return {**inputs, "encoder_outputs": self._encode_prompts(inputs)}

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        check_length(self.model.config, prompt_length, new_tokens)

    def _encode_prompts(self, inputs: dict[str, Any]) -> Any:
        return self.model.get_encoder()(**inputs, return_dict=True)

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        problem = self.position_problem(len(input_ids), len(labels))
        return problem and f"is too long: {problem}"

    def _outputs(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        return generated[:, 1:]  # the start token

    def _encode(self, what: str, max_length: int | None, **texts: list[str]) -> list[list[int]]:
        ids = self.processor(**texts, verbose=False)["input_ids"]
        if not _warn_of_truncation(what, ids, max_length):
            return ids
        return self.processor(**texts, truncation=True, max_length=max_length)["input_ids"]


class LLM2SLMTextToText(EncoderDecoderTextToText):
    """An LLM-to-SLM model with its [`LLM2SLMProcessor`], which truncates prompts and targets."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("prompt_max_length", "target_max_length"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.processor, name))
            setattr(self.processor, name, getattr(self, name))

    @property
    def collator(self) -> Any:
        return DataCollatorForLLM2SLM(self.processor, model=self.model, states=self.states)

    def features(self, prompts: list[str], targets: list[str] | None = None) -> Features:
        return dict(self.processor(text=list(prompts), text_target=None if targets is None else list(targets)))

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        if not prompt_length:
            raise ValueError("The prompt is empty.")
        self.model.config.check_llm_length(prompt_length)
        self.model.config.check_length(prompt_length, new_tokens)

    def parts(self) -> list[Part]:
        return composite_parts(self.model)

    @property
    def _generating_model(self) -> Any:
        return self.model.decoder

    def pad(self, features: Features) -> Any:
        inputs = super().pad(features)
        if self.states is not None:
            inputs["llm_hidden_states"] = self.states.batch(inputs["input_ids"], inputs["attention_mask"])
        return inputs

    def _encode_prompts(self, inputs: dict[str, Any]) -> Any:
        return self.model.encode_prompt(**inputs)

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        config = self.model.config
        if not input_ids:
            return "has an empty prompt"
        if self.states is not None and input_ids not in self.states:
            return (
                f"is not in {self.states.path}, which was made from other data or with another prompt_max_length: "
                "encode all training and validation data, with the prompt_max_length of the recipe"
            )
        if config.llm_positions is not None and len(input_ids) > config.llm_positions:
            return f"has a prompt of {len(input_ids)} tokens, but the LLM has {config.llm_positions} positions"
        if not config.fits(len(input_ids), len(labels)):
            return f"has {len(input_ids) + len(labels)} tokens, but the SLM has {self._positions} positions"
        return None


class DecoderOnlyTextToText(TextToText):
    """
    A decoder-only model, such as a GPT-2, on sequences of the form `[prompt] [separator] [target] [end]`.

    The separator is the tokenizer's start token, or its end token if it has no start token. Only the target and its
    end token count in the loss. Prompts are padded on the left for generation.
    """

    _padding_side = "left"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.tokenizer.pad_token_id is None:  # padding is masked, so any id will do
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def collator(self) -> Any:
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return super().collator
        return DataCollatorForTargets(self.tokenizer)

    def features(self, prompts: list[str], targets: list[str] | None = None) -> Features:
        separator, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        separator = end if separator is None else separator
        inputs = [ids + [separator] for ids in self._encode("prompts", prompts, self.prompt_max_length)]
        features = {"input_ids": inputs}
        if targets is not None:
            longest = None if self.target_max_length is None else self.target_max_length - 1
            labels = [ids + [end] for ids in self._encode("targets", targets, longest)]
            examples = list(zip(inputs, labels, strict=True))
            features["input_ids"] = [prompt + target for prompt, target in examples]
            features["labels"] = [[-100] * len(prompt) + target for prompt, target in examples]
        features["attention_mask"] = [[1] * len(ids) for ids in features["input_ids"]]
        return features

    def check_positions(self, prompt_length: int, new_tokens: int) -> None:
        length = prompt_length + new_tokens
        if self._positions is not None and length > self._positions:
            raise ValueError(
                f"Prompt and output have {length} tokens together, but the model has {self._positions} positions. "
                "Set prompt_max_length, target_max_length or max_new_tokens."
            )

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        if self._positions is None or len(input_ids) <= self._positions:
            return None
        return f"has {len(input_ids)} tokens, but the model has {self._positions} positions"

    def _outputs(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        return generated[:, inputs["input_ids"].shape[1] :]

    def _encode(self, what: str, texts: list[str], max_length: int | None) -> list[list[int]]:
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        _warn_of_truncation(what, ids, max_length)
        return [row[:max_length] for row in ids]


@dataclass
class DataCollatorForTargets:
    """
    Pads batches for a decoder-only model so that it computes logits for targets only, which saves most of the work on
    short texts.

    The left side is padded, so that all targets of a batch end together, and `logits_to_keep` counts back from there.

    Args:
        tokenizer: The tokenizer that pads.

    Returns:
        `input_ids`, `attention_mask` and `position_ids` `(B, N)`, `labels` `(B, K)`, and K as `logits_to_keep`: one
        more than the length of the longest target, since the separator predicts its first token.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in features]
        batch = dict(self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt", verbose=False))
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        targets = [[label for label in row["labels"] if label != -100] for row in features]
        kept = 1 + max(map(len, targets))
        batch["labels"] = torch.tensor([[-100] * (kept - len(target)) + target for target in targets])
        return {**batch, "logits_to_keep": kept}


def is_sampled(text_to_text: TextToText, generate_kwargs: Mapping[str, Any]) -> bool:
    """Return whether two outputs for one prompt may differ."""
    default = getattr(getattr(text_to_text.model, "generation_config", None), "do_sample", False)
    return bool(generate_kwargs.get("do_sample", default))


def _warn_of_truncation(what: str, rows: list[list[int]], max_length: int | None) -> bool:
    """Warn of texts that are truncated, and return whether there are any."""
    cut = 0 if max_length is None else sum(len(row) > max_length for row in rows)
    if cut:
        logger.warning(f"{cut} of {len(rows)} {what} are longer than {max_length} tokens and were truncated.")
    return cut > 0
