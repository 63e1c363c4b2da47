# Copyright 2026 The modeling-llm2slm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor of an LLM-to-SLM model: the LLM's tokenizer for prompts, the SLM's for targets and outputs."""

import copy
from collections.abc import Callable
from typing import Any

from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging


logger = logging.get_logger(__name__)


class LLM2SLMProcessor(ProcessorMixin):
    r"""
    Turns prompts into token ids of the LLM and targets into token ids of the SLM, and decodes outputs of the SLM.

    A tokenizer without a pad token (GPT-2's) pads with its end token: padding is never found by comparing ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The LLM's, for prompts; `AutoTokenizer` loads this one.
        decoder_tokenizer (`PreTrainedTokenizerBase`): The SLM's, for targets and outputs.
        prompt_max_length (`int`, *optional*):
            Truncate longer prompts to this many tokens, with a warning that counts them. Default: never.
        target_max_length (`int`, *optional*): The same for targets, end token included.
        chat_template (`str`, *optional*): A chat template to use instead of the tokenizer's.
        answer_max_length (`int`, *optional*): The former name of `target_max_length`.

    Example:

    ```python
    >>> processor = LLM2SLMProcessor.from_encoder_decoder_pretrained("google-t5/t5-large", "openai-community/gpt2")
    >>> batch = processor(text=["translate: Hello"], text_target=["Hallo"], padding=True, return_tensors="pt")
    >>> sorted(batch)
    ['attention_mask', 'input_ids', 'labels']
    ```
    """

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
        for name, part in (("tokenizer", tokenizer), ("decoder_tokenizer", decoder_tokenizer)):
            if part.pad_token_id is None and part.eos_token_id is not None:
                part.pad_token = part.eos_token
            elif part.pad_token_id is None:
                raise ValueError(f"`{name}` has neither pad nor end token. Set one: `{name}.pad_token = ...`.")
        if decoder_tokenizer.eos_token_id is None:
            raise ValueError("`decoder_tokenizer` has no end token, so no output could end. Set its `eos_token`.")
        if decoder_tokenizer is tokenizer:
            decoder_tokenizer = copy.deepcopy(tokenizer)  # stock `save_pretrained` cannot save one object twice
        self.prompt_max_length = prompt_max_length
        self.target_max_length = target_max_length
        super().__init__(tokenizer, decoder_tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: Any = None,
        text_target: str | list[str] | None = None,
        padding: bool | str = False,
        prompt_max_length: int | None = None,
        target_max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        add_generation_prompt: bool = True,
        answer_max_length: int | None = None,
    ) -> BatchFeature:
        """
        Args:
            text (`str`, `list[str]`, a conversation or a list of these, *optional*):
                Prompts. The chat template of the LLM's tokenizer turns a conversation (a list of dicts with `"role"`
                and `"content"`) into one.
            text_target (`str` or `list[str]`, *optional*): Targets, one for each prompt.
            padding (`bool` or `str`, *optional*): `True` pads to the longest prompt, `"max_length"` to the limits.
            prompt_max_length, target_max_length (`int`, *optional*): Override the processor's for this call.
            pad_to_multiple_of (`int`, *optional*): Pad lengths to a multiple of this.
            return_tensors (`str`, *optional*): `"pt"` for tensors.
            add_generation_prompt (`bool`, *optional*, defaults to `True`): See `apply_chat_template`.
            answer_max_length (`int`, *optional*): The former name of `target_max_length`.

        Returns:
            `BatchFeature`: For prompts, `input_ids` and `attention_mask` `(B, N)`, ids of the LLM; for targets,
            `labels` `(B, M)`, ids of the SLM that end with its end token and have no start token; -100 on padding.
        """
        if text is None and text_target is None:
            raise ValueError("There is nothing to process: pass `text` (prompts), `text_target` (targets) or both.")
        pad = {"padding": padding, "pad_to_multiple_of": pad_to_multiple_of, "return_tensors": return_tensors}
        features: dict[str, Any] = {}
        if text is not None:
            limit = self.prompt_max_length if prompt_max_length is None else prompt_max_length
            encoded = self._encode_prompts([text] if _is_one(text) else list(text), limit, add_generation_prompt)
            features.update(_pad(self.tokenizer, encoded, limit, **pad))
        if text_target is not None:
            target_max_length = answer_max_length if target_max_length is None else target_max_length
            limit = self.target_max_length if target_max_length is None else target_max_length
            targets = self._encode_targets([text_target] if isinstance(text_target, str) else list(text_target), limit)
            if text is not None and len(targets) != len(encoded):
                raise ValueError(
                    f"`text` holds {len(encoded)} prompts and `text_target` {len(targets)} targets. Pass one target "
                    "for each prompt."
                )
            features["labels"] = self.pad_labels(targets, limit, **pad)
        if return_tensors is None and _is_one(text if text is not None else text_target):
            features = {name: rows[0] for name, rows in features.items()}
        return BatchFeature(features)

    def apply_chat_template(
        self, conversation: Any, tokenize: bool = False, add_generation_prompt: bool = True, **kwargs: Any
    ) -> Any:
        """
        Apply the chat template of the LLM's tokenizer to a conversation or a list of them.

        Args:
            conversation (`list[dict[str, str]]` or a list of these): Messages with `"role"` and `"content"`.
            tokenize (`bool`, *optional*, defaults to `False`): Return the result of `__call__` instead of text.
            add_generation_prompt (`bool`, *optional*, defaults to `True`):
                Whether the prompt ends with the template's start of a reply, which the SLM writes.
            kwargs: Arguments of the template (`tools`, `documents`, ...), or with `tokenize` of `__call__`.
        """
        if tokenize:
            return self(conversation, add_generation_prompt=add_generation_prompt, **kwargs)
        kwargs.setdefault("chat_template", self.chat_template)
        return self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )

    def _encode_prompts(
        self, prompts: list[Any], max_length: int | None, add_generation_prompt: bool
    ) -> list[list[int]]:
        if not prompts:
            raise ValueError("`text` is an empty list. Pass at least one prompt.")
        are_conversations = not _is_text(prompts[0])
        _check_kind("text", prompts, _is_conversation if are_conversations else _is_text)
        if are_conversations:
            prompts = self.apply_chat_template(prompts, add_generation_prompt=add_generation_prompt)
        special = {"add_special_tokens": not are_conversations}  # the template writes its own
        encoded = self.tokenizer(prompts, verbose=False, **special).input_ids
        if max_length is None or max(map(len, encoded)) <= max_length:
            return encoded
        _warn_of_truncation("prompt", sum(len(row) > max_length for row in encoded), len(encoded), max_length)
        return self.tokenizer(prompts, truncation=True, max_length=max_length, **special).input_ids

    def _encode_targets(self, targets: list[str], max_length: int | None) -> list[list[int]]:
        if not targets:
            raise ValueError("`text_target` is an empty list. Pass at least one target.")
        _check_kind("text_target", targets, _is_text)
        eos = self.decoder_tokenizer.eos_token_id
        encoded = self.decoder_tokenizer(targets, add_special_tokens=False, verbose=False).input_ids
        for row in encoded:
            while row and row[-1] == eos:  # an end token in the text itself
                row.pop()
        if max_length is not None and (cut := sum(len(row) >= max_length for row in encoded)):
            _warn_of_truncation("target", cut, len(encoded), max_length)
        return [row[: max_length - 1 if max_length is not None else None] + [eos] for row in encoded]

    def pad_labels(self, labels: list[list[int]], max_length: int | None = None, **pad: Any) -> Any:
        """Pad targets of different lengths to `(B, M)` with -100, which comes from the mask and not from ids."""
        padded = _pad(self.decoder_tokenizer, labels, max_length, padding_side="right", **pad)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        if isinstance(ids, list):
            return [[i if kept else -100 for i, kept in zip(*row, strict=True)] for row in zip(ids, mask, strict=True)]
        return ids * mask - 100 * (1 - mask)

    def decode(self, *args: Any, **kwargs: Any) -> str | list[str]:
        """Decode with the SLM's tokenizer."""
        return self.decoder_tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decode a batch with the SLM's tokenizer."""
        return self.decoder_tokenizer.batch_decode(*args, **kwargs)

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


def _is_one(text: Any) -> bool:
    """Return whether this is one text or one conversation, and not a list of them."""
    return _is_text(text) or _is_conversation(text)


def _is_text(text: Any) -> bool:
    return isinstance(text, str)


def _is_conversation(text: Any) -> bool:
    return isinstance(text, list) and bool(text) and all(isinstance(message, dict) for message in text)


def _check_kind(name: str, texts: list[Any], is_right: Callable[[Any], bool]) -> None:
    wrong = [text for text in texts if not is_right(text)]
    if wrong:
        kinds = "texts, or conversations" if name == "text" else "texts"
        raise ValueError(f"`{name}` holds {wrong[0]!r:.60}, but it takes {kinds}. Join the words into one string.")


def _pad(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], max_length: int | None, **kwargs: Any
) -> BatchEncoding:
    if kwargs["padding"] == "max_length" and max_length is None:
        raise ValueError('`padding="max_length"` needs a length: pass `prompt_max_length` and `target_max_length`.')
    masks = [[1] * len(row) for row in rows]
    return tokenizer.pad(
        BatchEncoding({"input_ids": rows, "attention_mask": masks}), max_length=max_length, verbose=False, **kwargs
    )


def _warn_of_truncation(what: str, number: int, total: int, max_length: int) -> None:
    logger.warning(
        f"{number} of {total} {what}s are longer than `{what}_max_length` ({max_length} tokens) and were truncated."
    )


__all__ = ["LLM2SLMProcessor"]
