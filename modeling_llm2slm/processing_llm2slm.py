# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Processor of an LLM-to-SLM model: the LLM's tokenizer for prompts, the SLM's for targets and outputs."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor, BatchEncoding, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import logging, to_py_obj


logger = logging.get_logger(__name__)


class LLM2SLMProcessor(ProcessorMixin):
    r"""
    Turns prompts into token ids of the LLM and targets into token ids of the SLM, and decodes outputs of the SLM.

    A tokenizer without a pad token (GPT-2's) pads with its end token: padding is never found by comparing ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The LLM's, for prompts.
        decoder_tokenizer (`PreTrainedTokenizerBase`): The SLM's, for targets and outputs.
        prompt_max_length (`int`, *optional*):
            Truncate longer prompts to this many tokens, with a warning that counts them. Default: never.
        target_max_length (`int`, *optional*): The same for targets, end token included.
        chat_template (`str`, *optional*): A chat template to use instead of the tokenizer's.
        answer_max_length (`int`, *optional*): The former name of `target_max_length`.
    """

    padding_side = "right"  # of labels, which `DataCollatorForSeq2Seq` pads

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        decoder_tokenizer: PreTrainedTokenizerBase,
        prompt_max_length: int | None = None,
        target_max_length: int | None = None,
        chat_template: str | None = None,
        answer_max_length: int | None = None,
    ) -> None:
        target_max_length = answer_max_length if target_max_length is None else target_max_length
        for name, length, minimum in (("prompt", prompt_max_length, 1), ("target", target_max_length, 2)):
            if length is not None and (not isinstance(length, int) or length < minimum):
                raise ValueError(
                    f"`{name}_max_length` is {length!r}, but it must be None or an int of at least {minimum}."
                )
        if isinstance(tokenizer, LLM2SLMTokenizer):
            tokenizer = tokenizer.processor.tokenizer
        decoder_tokenizer = getattr(decoder_tokenizer, "decoder_tokenizer", decoder_tokenizer)
        for name, part in (("tokenizer", tokenizer), ("decoder_tokenizer", decoder_tokenizer)):
            if part.pad_token_id is None and part.eos_token_id is not None:
                part.pad_token = part.eos_token
            elif part.pad_token_id is None:
                raise ValueError(f"`{name}` has neither pad nor end token. Set one: `{name}.pad_token = ...`.")
        if decoder_tokenizer.eos_token_id is None:
            raise ValueError("`decoder_tokenizer` has no end token, so no output could end. Set its `eos_token`.")
        if decoder_tokenizer is tokenizer:
            decoder_tokenizer = copy.deepcopy(tokenizer)  # stock `save_pretrained` cannot save one object twice
        # For `generate()`, which finds stop strings in outputs.
        tokenizer.slm_tokenizer = None if _are_same(tokenizer, decoder_tokenizer) else decoder_tokenizer
        decoder_tokenizer.slm_tokenizer = None
        self.prompt_max_length = prompt_max_length
        self.target_max_length = target_max_length
        super().__init__(tokenizer, decoder_tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: Any = None,
        text_target: str | list[str] | None = None,
        padding: bool | str = False,
        *,
        prompt_max_length: int | None = None,
        target_max_length: int | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            text (`str`, `list[str]`, a conversation or a list of these, *optional*):
                Prompts. The chat template of the LLM's tokenizer turns a conversation (a list of dicts with `"role"`
                and `"content"`) into one. A prompt that has the template's special tokens gets no others.
            text_target (`str` or `list[str]`, *optional*): Targets, one for each prompt.
            padding (`bool` or `str`, *optional*): `True` pads to the longest prompt, `"max_length"` to the limits.
            prompt_max_length, target_max_length (`int`, *optional*): Limits of this call; `max_length` sets both.
            pad_to_multiple_of (`int`, *optional*): Pad lengths to a multiple of this.
            return_tensors (`str`, *optional*): `"pt"` for tensors.
            add_generation_prompt (`bool`, *optional*, defaults to `True`): See `apply_chat_template`.
            kwargs: Arguments of the LLM's tokenizer.

        Returns:
            `BatchFeature`: For prompts, `input_ids` and `attention_mask` `(B, N)`, ids of the LLM; for targets,
            `labels` `(B, M)`, ids of the SLM that end with its end token and have no start token; -100 on padding.
        """
        pad = {"padding": padding, "pad_to_multiple_of": pad_to_multiple_of, "return_tensors": return_tensors}
        features: dict[str, Any] = {}
        if text is not None:
            limit = prompt_max_length or max_length or self.prompt_max_length
            prompts = [text] if is_one(text) else list(text)
            encoded = self._encode_prompts(prompts, limit, add_generation_prompt, **kwargs)
            features.update(self.tokenizer.pad(encoded, max_length=limit, verbose=False, **pad))
        if text_target is not None:
            limit = target_max_length or max_length or self.target_max_length
            with_end = text is not None or kwargs.get("add_special_tokens", True)
            targets = [text_target] if isinstance(text_target, str) else list(text_target)
            features["labels"] = self.pad_labels(self._encode_targets(targets, limit, with_end), limit, **pad)
        if return_tensors is None and is_one(text if text is not None else text_target):
            features = {name: rows[0] for name, rows in features.items()}
        return BatchFeature(features)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Apply the chat template of the LLM's tokenizer to a conversation or a list of them, which gives text; with
        `tokenize`, return the result of `__call__`. `add_generation_prompt` adds the template's start of a reply.
        `kwargs` are arguments of the template (`tools`, `documents`, ...), or of `__call__`.
        """
        if tokenize:
            return self(conversation, add_generation_prompt=add_generation_prompt, **kwargs)
        kwargs |= {"chat_template": chat_template or self.chat_template, "tokenize": False}
        return self.tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **kwargs)

    def _encode_prompts(
        self, prompts: list[Any], max_length: int | None, add_generation_prompt: bool, **kwargs: Any
    ) -> BatchEncoding:
        if not isinstance(prompts[0], str):
            prompts = self.apply_chat_template(prompts, add_generation_prompt=add_generation_prompt)
        add_special_tokens = kwargs.pop("add_special_tokens", True)
        special = [add_special_tokens and not self.is_chat(prompt) for prompt in prompts]
        kwargs = {"return_token_type_ids": False, **kwargs, "return_attention_mask": True, "verbose": False}

        def encode(**kwargs: Any) -> BatchEncoding:
            if len(set(special)) == 1:
                return self.tokenizer(prompts, add_special_tokens=special[0], **kwargs)
            each = zip(prompts, special, strict=True)
            rows = [self.tokenizer(prompt, add_special_tokens=add, **kwargs) for prompt, add in each]
            return BatchEncoding({name: [row[name] for row in rows] for name in rows[0]})

        encoded = encode(**kwargs)
        if max_length is None or max(map(len, encoded["input_ids"])) <= max_length:
            return encoded
        longer = sum(len(row) > max_length for row in encoded["input_ids"])
        _warn_of_truncation("prompt", longer, len(prompts), max_length)
        return encode(**kwargs | {"truncation": True, "max_length": max_length})

    def is_chat(self, prompt: str) -> bool:
        """Return whether a chat template wrote a prompt, with all the special tokens that it needs."""
        start, template = self.tokenizer.bos_token, self.chat_template or self.tokenizer.chat_template
        special = self.tokenizer.all_special_tokens if template else []
        return bool(start and prompt.startswith(start)) or any(token in prompt for token in special)

    def _encode_targets(self, targets: list[str], max_length: int | None, with_end: bool) -> list[list[int]]:
        end = [self.decoder_tokenizer.eos_token_id] if with_end else []
        encoded = self.decoder_tokenizer(targets, add_special_tokens=False, verbose=False).input_ids
        for row in encoded:
            while end and row[-1:] == end:  # an end token in the text itself
                row.pop()
        if max_length is None:
            return [row + end for row in encoded]
        if cut := sum(len(row + end) > max_length for row in encoded):
            _warn_of_truncation("target", cut, len(encoded), max_length)
        return [row[: max_length - len(end)] + end for row in encoded]

    def pad_labels(self, labels: list[list[int]], max_length: int | None = None, **pad: Any) -> Any:
        """Pad targets of different lengths to `(B, M)` with -100, which comes from the mask and not from ids."""
        rows = BatchEncoding({"input_ids": labels, "attention_mask": [[1] * len(row) for row in labels]})
        padded = self.decoder_tokenizer.pad(rows, max_length=max_length, padding_side="right", verbose=False, **pad)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        if isinstance(ids, list):
            return [[i if kept else -100 for i, kept in zip(*row, strict=True)] for row in zip(ids, mask, strict=True)]
        return ids * mask - 100 * (1 - mask)

    def pad(self, encoded_inputs: Any, padding: bool | str = True, **kwargs: Any) -> BatchEncoding:
        """Pad results of calls to a batch, see [`PreTrainedTokenizerBase.pad`]; labels with `pad_labels`."""
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        rows = dict(encoded_inputs)
        labels = to_py_obj(rows.pop("labels", None))
        batch = self.tokenizer.pad(rows, padding, **kwargs) if rows else BatchEncoding()
        if labels is not None and None not in labels:
            names = {"max_length", "pad_to_multiple_of", "return_tensors"} & kwargs.keys()
            is_one = isinstance(labels[0], int)
            labels = self.pad_labels([labels] if is_one else labels, padding=padding, **{k: kwargs[k] for k in names})
            batch["labels"] = labels[0] if is_one else labels
        return batch

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str | list[str]:
        """Decode outputs or labels with the SLM's tokenizer; -100 is skipped."""
        return self.decoder_tokenizer.decode(_without_padding(to_py_obj(token_ids)), *args, **kwargs)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Decode a batch of outputs or labels with the SLM's tokenizer; -100 is skipped."""
        return self.decoder_tokenizer.batch_decode(_without_padding(to_py_obj(sequences)), *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save tokenizers and settings, see [`ProcessorMixin.save_pretrained`]."""
        written = super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory, "tokenizer_config.json")
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        code = config.get("auto_map", {})
        if config and self.tokenizer.slm_tokenizer is not None and "AutoTokenizer" not in code:  # not custom code
            config |= {"tokenizer_class": "LLM2SLMTokenizer", "llm_tokenizer_class": config["tokenizer_class"]}
            if "AutoProcessor" in code:
                code["AutoTokenizer"] = [code["AutoProcessor"].removesuffix("Processor") + "Tokenizer", None]
            file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return written

    @classmethod
    def _load_tokenizer_from_pretrained(cls, name: str, path: Any, subfolder: str = "", **kwargs: Any) -> Any:
        config = get_tokenizer_config(path, subfolder=subfolder, **kwargs) if name == "tokenizer" else {}
        if "llm_tokenizer_class" not in config:
            return super()._load_tokenizer_from_pretrained(name, path, subfolder, **kwargs)
        llm_class = tokenizer_class_from_name(config["llm_tokenizer_class"]) or transformers.PreTrainedTokenizerFast
        tokenizer = llm_class.from_pretrained(path, subfolder=subfolder, **kwargs)
        for key in ("auto_map", "llm_tokenizer_class"):  # they describe the folder
            tokenizer.init_kwargs.pop(key, None)
        return tokenizer

    @property
    def pad_token_id(self) -> int:
        """`int`: The SLM's pad id. `Seq2SeqTrainer` pads outputs with it."""
        return self.decoder_tokenizer.pad_token_id

    @property
    def eos_token_id(self) -> int:
        """`int`: The SLM's end id."""
        return self.decoder_tokenizer.eos_token_id

    @property
    def model_input_names(self) -> list[str]:
        """`list[str]`: The keys of a call's result that the model takes."""
        return ["input_ids", "attention_mask", "labels"]


class LLM2SLMTokenizer(transformers.PreTrainedTokenizerFast):
    """
    Both tokenizers of a [`LLM2SLMProcessor`] as one, for code that takes one: `AutoTokenizer` loads it.

    It encodes prompts with the LLM's tokenizer; it decodes, and encodes `text_target`, with the SLM's. Its vocabulary,
    special tokens and all other ids are the SLM's, like the ids that a model generates.
    """

    # What it takes from the processor and the LLM's tokenizer; all else is the SLM's.
    OF_BOTH = "batch_decode decode decoder_tokenizer model_input_names pad padding_side push_to_hub save_pretrained"
    OF_THE_LLM = "apply_chat_template chat_template get_chat_template init_kwargs model_max_length name_or_path"
    OF_THE_LLM += " is_fast num_special_tokens_to_add truncation_side"

    def __init__(self, processor: LLM2SLMProcessor) -> None:
        object.__setattr__(self, "processor", processor)

    @classmethod
    def from_pretrained(cls, path: Any, *inputs: Any, **kwargs: Any) -> "LLM2SLMTokenizer":
        """Load both tokenizers from a folder or repository."""
        return cls(AutoProcessor.from_pretrained(path, **kwargs))

    def _owner(self, name: str) -> Any:
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, LLM2SLMTokenizer)]  # vLLM makes a subclass
        if name.startswith("__") or name == "processor" or any(name in vars(kind) for kind in kinds):
            return self
        processor = self.processor
        if name in self.OF_BOTH.split():
            return processor
        return processor.tokenizer if name in self.OF_THE_LLM.split() else processor.decoder_tokenizer

    def __getattribute__(self, name: str) -> Any:
        owner = object.__getattribute__(self, "_owner")(name)
        return object.__getattribute__(self, name) if owner is self else getattr(owner, name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self.processor.tokenizer if name == "padding_side" else self._owner(name)  # it is that of prompts
        (object.__setattr__ if owner is self else setattr)(owner, name, value)

    def __len__(self) -> int:
        return len(self.decoder_tokenizer)

    def __call__(self, text: Any = None, text_pair: Any = None, text_target: Any = None, **kwargs: Any) -> Any:
        """Encode prompts as the LLM's tokenizer does, and `text_target` as labels: end token, -100 on padding."""
        longest = kwargs.pop("max_target_length", None)
        encoded = BatchEncoding()
        if text is not None or text_target is None:
            encoded = self.processor.tokenizer(text, text_pair, **{"return_token_type_ids": False} | kwargs)
        if text_target is None:
            return encoded
        names = ("padding", "pad_to_multiple_of", "return_tensors", *(["add_special_tokens"] if text is None else []))
        if longest is None and (kwargs.get("truncation") or kwargs.get("padding") not in (True, "longest")):
            longest = kwargs.get("max_length")
        kwargs = {name: kwargs[name] for name in names if name in kwargs}
        encoded["labels"] = self.processor(text_target=text_target, target_max_length=longest, **kwargs)["labels"]
        return encoded if text is not None else BatchEncoding({"input_ids": encoded["labels"]})

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        """
        Encode a prompt. Without special tokens, a text that no chat template wrote is a piece of the output, which is
        scored or looked for, unless `return_tensors` asks for a batch.
        """
        is_prompt = add_special_tokens or kwargs.get("return_tensors") or self.processor.is_chat(str(text))
        tokenizer = self.processor.tokenizer if is_prompt else self.decoder_tokenizer
        return tokenizer.encode(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)


def _are_same(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    probe = "Is THIS one\n  the  same, naïve 12345?"
    return first(probe).input_ids == second(probe).input_ids and first.get_vocab() == second.get_vocab()


def _without_padding(ids: Any) -> Any:
    if not isinstance(ids, (list, tuple)):
        return [] if ids == -100 else ids
    return [_without_padding(i) if isinstance(i, (list, tuple)) else i for i in ids if i != -100]


def is_one(text: Any) -> bool:
    """Return whether this is one text or one conversation, and not a list of them."""
    is_conversation = isinstance(text, list) and bool(text) and all(isinstance(message, dict) for message in text)
    return is_conversation or isinstance(text, str)


def _warn_of_truncation(what: str, number: int, total: int, max_length: int) -> None:
    logger.warning(
        f"{number} of {total} {what}s are longer than `{what}_max_length` ({max_length} tokens) and were truncated."
    )


__all__ = ["LLM2SLMProcessor", "LLM2SLMTokenizer"]
