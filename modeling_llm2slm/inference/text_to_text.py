"""Text in, text out: one interface over every kind of checkpoint, so that the same code trains and scores all."""

from __future__ import annotations

import copy
import hashlib
import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from ..data.conversations import as_prompt, is_conversation
from ..data.order import seeded
from ..settings import GenerateArguments, check_generate_arguments, check_value, shown, types_of
from ..states.fingerprints import tokenizer_fingerprint
from ..states.store import StateStore
from .batching import BatchLimits, OutputId, PromptTable, can_overlap, one_ahead, prompts_of, take_rows
from .engine import DEFAULT, LoadOptions, engine_of
from .engine import engine as engine_named
from .parts import Part, count_parameters, decoding_modules, part_of
from .text_stream import StreamedText


DEFAULT_MAX_NEW_TOKENS = 128
# Arguments of `generate()` for which transformers refuses whole numbers.
FLOATS = {setting.name for setting, kind in types_of(GenerateArguments).items() if float in get_args(kind)}
# Arguments of `generate()` that are objects.
OBJECTS = {
    "assistant_model": torch.nn.Module,
    "generation_config": GenerationConfig,
    "logits_processor": list,
    "stopping_criteria": list,
    "streamer": BaseStreamer,
}
# Arguments of `generate()` that write to the logits of token ids.
TOKEN_IDS = ("bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens")
Features = dict[str, list[list[int]]]


class TextToText:
    """
    A model that reads a prompt and generates text, together with its tokenizers.

    [`TextToText.from_pretrained`] loads any checkpoint: an LLM-to-SLM model, exported or not, another encoder-decoder
    (T5) or a decoder-only model (GPT-2). It returns the subclass that fits.

    Example:

    ```python
    from modeling_llm2slm import TextToText

    model = TextToText.from_pretrained("runs/model")
    model("A man sleeps on a sofa.")  # a text
    model(["A man sleeps on a sofa.", "Two dogs run."], num_beams=4, max_new_tokens=32)  # a list of two texts
    model([{"role": "user", "content": "Hello"}], do_sample=True, temperature=0.7)  # a conversation gives a text too
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
        is_llm2slm: Whether the model is an LLM-to-SLM model.
    """

    states: StateStore | None = None
    is_llm2slm = False
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
    def from_pretrained(path: str | Path, engine: str | None = None, **options: Any) -> TextToText:
        """
        Load a checkpoint of any kind.

        Args:
            path: A folder, or the name of a model on the Hub.
            engine: The engine that computes it, such as `"vllm"`. Default: the one that it was exported for, or
                PyTorch.
            options: How to load it: the arguments of [`LoadOptions`], such as `dtype` and `device`.

        Raises:
            ImportError: If the checkpoint's engine, or the library that quantizes, is not installed.
            OSError: If the checkpoint does not exist, is damaged or is incomplete.
            ValueError: If the engine or the device does not exist, the engine cannot compute the checkpoint, the model
                does not generate text, or the store belongs to another LLM.
        """
        wanted, own = LoadOptions(**options), engine_of(path)
        chosen = own if engine is None else engine_named(engine)
        if own.name not in (DEFAULT, chosen.name):
            raise ValueError(f"{path} was exported for {own.name} and runs in no other engine: leave engine out.")
        return chosen.load(path, wanted)

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """
        Save the model and its processor, so that `from_pretrained` finds both.

        Args:
            path: The folder to write to.
            kwargs: Arguments of the model's `save_pretrained`; an LLM-to-SLM model has `include_llm` and `card`.
        """
        self.model.save_pretrained(path, **kwargs)
        self.processor.save_pretrained(path)

    def __call__(self, prompts: Any, batch_size: int = 32, **generate_kwargs: Any) -> Any:
        """
        Generate text for one prompt or a list of prompts, see [`~TextToText.generate`].

        Args:
            prompts: A text, a conversation (a list of messages with `"role"` and `"content"`), or a list of these.
            batch_size: Prompts per batch.
            generate_kwargs: Arguments of `model.generate()`, such as `num_beams`, `do_sample` and `max_new_tokens`.

        Returns:
            The output for one prompt, or a list with one output per prompt.
        """
        is_one = isinstance(prompts, str | bytes | Mapping) or is_conversation(prompts)
        if is_one or not isinstance(prompts, Iterable):  # `generate` refuses what is not a prompt
            return self.generate([prompts], batch_size, **generate_kwargs)[0]
        return self.generate(list(prompts), batch_size, **generate_kwargs)

    def generate(self, prompts: Sequence[Any], batch_size: int = 32, **generate_kwargs: Any) -> list[str]:
        """
        Generate text for prompts.

        Args:
            prompts: Any number of prompts: texts, or conversations, which the chat template of the LLM's tokenizer
                turns into texts. Prompts of similar length share a batch; a prompt that occurs twice is generated for
                once, unless outputs are sampled.
            batch_size: Prompts per batch.
            generate_kwargs: Arguments of `model.generate()`, such as `num_beams` and `max_new_tokens`.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ValueError: If an argument is outside its bounds, see [`GenerateArguments`], a prompt is empty, or a prompt
                and its output do not fit into the model's positions. This is checked before any compute.
        """
        tokens = self.generate_tokens(prompts, batch_size, **generate_kwargs)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []

    def generate_tokens(self, prompts: Sequence[Any], batch_size: int = 32, **generate_kwargs: Any) -> list[list[int]]:
        """Generate like [`~TextToText.generate`], but return the token ids of each output, the end token included."""
        check_value("batch_size", batch_size, {"minimum": 1}, int)
        if not prompts:
            return []
        if isinstance(prompts, str):
            raise ValueError("`prompts` is one text. Pass a list of prompts, or call the model: `model(prompt)`.")
        prompts = [as_prompt(prompt) for prompt in prompts]
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
            features_of: Returns the features, see [`~TextToText.features`], of rows given by their indices.
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
            return self.read(features_of([table.rows[prompt_index] for prompt_index in prompts_of(batch)]))

        if overlap is None:
            overlap = can_overlap(getattr(self.model, "device", None))
        for batch, inputs in zip(batches, one_ahead(read, batches, overlap), strict=True):
            row_of = {prompt_index: row for row, prompt_index in enumerate(prompts_of(batch))}
            for piece in table.pieces(batch, limits, known):
                if seed is not None:
                    # Seeded by the row, so that the rest of an interrupted run is sampled as without interruption.
                    prompt_index, sample_index = piece[0]
                    torch.manual_seed(seeded(seed, table.rows[prompt_index], sample_index).initial_seed())
                chosen = take_rows(inputs, [row_of[prompt_index] for prompt_index, _ in piece])
                yield piece, self.write(chosen, **generate_kwargs)

    def stream(self, prompt: Any, seed: int | None = None, **generate_kwargs: Any) -> Generator[str]:
        """
        Generate for one prompt, and yield the text piece by piece.

        Args:
            prompt: The prompt, a text or a conversation.
            seed: Seed of sampling, as for [`~TextToText.generate`].
            generate_kwargs: As for [`~TextToText.generate`]. Beam search (`num_beams` above 1) cannot stream.

        Yields:
            Pieces of text. Joined, they equal the output of [`~TextToText.generate`]. Closing the generator early
            stops the model.
        """
        features, generate_kwargs = self._prepare([as_prompt(prompt)], generate_kwargs)
        inputs, text = self.read(features), StreamedText(self.tokenizer)
        criteria = StoppingCriteriaList([*(generate_kwargs.pop("stopping_criteria", None) or ()), text.stopping])
        errors: list[BaseException] = []

        def write() -> None:
            try:
                if seed is not None:
                    torch.manual_seed(seeded(seed, 0, 0).initial_seed())
                self._generate(inputs, streamer=text, stopping_criteria=criteria, **generate_kwargs)
            except BaseException as error:
                errors.append(error)
                text.end()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from text
        finally:  # the caller may close the generator early
            text.stop()
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
        generated = self._outputs(self._generate(inputs, **generate_kwargs), inputs)
        return [self._until_end(tokens) for tokens in generated.tolist()]

    def _generate(self, inputs: Mapping[str, Any], **generate_kwargs: Any) -> torch.Tensor:
        """Return the tokens of `model.generate()`, whatever else is asked for; it finds stop strings in the output."""
        configs = (generate_kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        if generate_kwargs.get("stop_strings") or any(getattr(config, "stop_strings", None) for config in configs):
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        return self.model.generate(**inputs, **{**generate_kwargs, "return_dict_in_generate": False})

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
        """The data collator for a Trainer, which pads a list of features to a batch."""
        return DataCollatorForSeq2Seq(self.tokenizer, model=self.model)

    def fingerprint(self) -> str:
        """Return a hash of everything that features and their problems depend on."""
        reader = getattr(self.processor, "tokenizer", self.processor)
        parts = [type(self).__name__, tokenizer_fingerprint(reader), tokenizer_fingerprint(self.tokenizer)]
        parts += [str(self.prompt_max_length), str(self.target_max_length), str(self.max_positions)]
        parts.append(str(getattr(self.model.config, "llm_positions", None)))
        parts += [str(getattr(holder, "chat_template", None)) for holder in (self.processor, reader)]
        return hashlib.sha256("|".join([*parts, str(self.states and self.states.description)]).encode()).hexdigest()

    def without_model(self) -> TextToText:
        """Return a copy without weights that gives the same features and problems, to be sent to other processes."""
        reader, generation_config = copy.copy(self), getattr(self.model, "generation_config", None)
        reader.model = cast(
            PreTrainedModel, SimpleNamespace(config=self.model.config, generation_config=generation_config)
        )
        return reader

    def with_limit(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        Return arguments of `generate()` that limit the output.

        The limit is, in this order: the one in `generate_kwargs`, `target_max_length`, the checkpoint's own, or
        `DEFAULT_MAX_NEW_TOKENS`, but at most half of the model's positions.

        Raises:
            ValueError: If an argument, or one of the checkpoint's own, holds a token id that the vocabulary lacks.
        """
        defaults = getattr(self.model, "generation_config", None)
        config = getattr(self.model, "config", None)  # an engine's model may have none
        size = getattr(config and config.get_text_config(decoder=True), "vocab_size", sys.maxsize)
        for name in TOKEN_IDS:
            given = generate_kwargs.get(name, getattr(defaults, name, None))
            wrong = next((token for token in _flattened(given) if not 0 <= token < size), None)
            if wrong is not None:
                raise ValueError(
                    f"{name} holds the id {wrong}, but the vocabulary of outputs has ids from 0 to {size - 1}. Use "
                    "ids of its tokenizer, and check generation_config.json."
                )
        own = self.target_max_length or getattr(defaults, "max_new_tokens", None)
        limit = own or min(DEFAULT_MAX_NEW_TOKENS, (self.max_positions or sys.maxsize) // 2)
        limits = {} if "max_length" in generate_kwargs else {"max_new_tokens": limit}
        given = {name: value for name, value in generate_kwargs.items() if value is not None}
        return {**limits, **given, **{name: float(given[name]) for name in given.keys() & FLOATS}}

    @property
    def max_positions(self) -> int | None:
        """The number of positions that prompt and output share; `None` without a limit. A subclass may override it."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

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
        check_generate_arguments(generate_kwargs)
        check_value("seed", generate_kwargs.get("seed"), {}, int | None)
        for name, kind in OBJECTS.items():
            given = generate_kwargs.get(name)
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{name} is {shown(given)}, but it must be a {kind.__name__}.")
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
        """The model that generates tokens: the whole model, or the SLM of an LLM-to-SLM model."""
        return self.model

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        return None

    def _outputs(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Remove the tokens that `generate()` returns before the output."""
        raise NotImplementedError

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _flattened(ids: Any) -> Iterator[int]:
    """Yield the token ids in nested lists, in a tensor or alone; nothing for `None`."""
    if isinstance(ids, torch.Tensor):
        yield from ids.flatten().tolist()
    elif isinstance(ids, list | tuple):
        for entry in ids:
            yield from _flattened(entry)
    elif ids is not None:
        yield ids


def is_sampled(text_to_text: TextToText, generate_kwargs: Mapping[str, Any]) -> bool:
    """Return whether two outputs for one prompt may differ."""
    default = getattr(getattr(text_to_text.model, "generation_config", None), "do_sample", False)
    return bool(generate_kwargs.get("do_sample", default))
