"""The processor of the package takes the arguments of tokenizers, and says what is wrong with a text."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy

from .. import processing_llm2slm
from ..processing_llm2slm import is_one


# Arguments of a call that hold others: those of a tokenizer.
NESTED = ("common_kwargs", "text_kwargs", "tokenizer_kwargs")
NOT_TAKEN = {"self", "kwargs", "text_pair", "text_pair_target"}
# With these, a tokenizer returns something else than one row of ids for each text.
UNSUPPORTED = {
    "is_split_into_words": "Join the words into one text.",
    "return_overflowing_tokens": "Split long prompts before.",
}
# Arguments of a template that need the tokenizer to apply it.
OF_TOKENIZERS = ("return_assistant_tokens_mask", "sanitize_control_tokens")
NO_LIMIT = sys.maxsize


def _names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - NOT_TAKEN


class TextProcessor(processing_llm2slm.LLM2SLMProcessor):
    """A processor that takes the arguments of tokenizers. See [`LLM2SLMProcessor`]."""

    @classmethod
    def _load_tokenizer_from_pretrained(cls, name: str, path: Any, subfolder: str = "", **kwargs: Any) -> Any:
        """Load one of the tokenizers. Stock takes the LLM's if the SLM's is missing or damaged."""
        if name == "tokenizer":
            return super()._load_tokenizer_from_pretrained(name, path, subfolder, **kwargs)
        return AutoTokenizer.from_pretrained(path, subfolder=f"{subfolder}/{name}" if subfolder else name, **kwargs)

    def __call__(self, text: Any = None, text_target: Any = None, padding: Any = False, **kwargs: Any) -> BatchFeature:
        """
        See the base class. `max_length` and `truncation` are those of a tokenizer, for prompts and targets; they
        override the limits of the processor. Other arguments of a tokenizer apply to prompts.

        Raises:
            TypeError: For an argument that neither the processor nor a tokenizer has.
            ValueError: For a text that is none, another number of targets than of prompts, and impossible lengths.
        """
        if text is None and text_target is None:
            raise ValueError("There is nothing to process: pass `text` (prompts), `text_target` (targets) or both.")
        options = _flatten({"padding": padding, **kwargs})
        padding, side = options.pop("padding", False), options.pop("padding_side", None)
        pad = {"padding": padding, "pad_to_multiple_of": options.pop("pad_to_multiple_of", None)}
        pad["return_tensors"] = options.pop("return_tensors", None)
        has_mask = options.pop("return_attention_mask", True)
        former_name = options.pop("answer_max_length", None)
        given = {
            "prompt": options.pop("prompt_max_length", None),
            "target": options.pop("target_max_length", former_name),
        }
        cut = {name: options.pop(name, None) for name in ("max_length", "truncation")}
        limits = {what: self._limits(what, length, padding, **cut) for what, length in given.items()}
        prompts, targets = as_texts("text", text), as_texts("text_target", text_target)
        if prompts is not None and targets is not None and len(prompts) != len(targets):
            raise ValueError(
                f"`text` holds {len(prompts)} prompts and `text_target` {len(targets)} targets. Pass one target for "
                "each prompt."
            )
        options |= {f"{what}_max_length": limit for what, (limit, _) in limits.items()}
        rows = dict(super().__call__(prompts, targets, **options))
        labels, features = rows.pop("labels", None), dict[str, Any]()
        if prompts is not None:
            width = _width(padding, limits["prompt"][1])
            features.update(self.tokenizer.pad(rows, max_length=width, padding_side=side, verbose=False, **pad))
            if not has_mask:
                del features["attention_mask"]
        if labels is not None:
            features["labels"] = self.pad_labels(labels, _width(padding, limits["target"][1]), **pad)
        if pad["return_tensors"] is None and is_one(text if text is not None else text_target):
            features = {name: values[0] for name, values in features.items()}
        return BatchFeature(features)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool | None = None,
        return_dict: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Apply the chat template of the LLM's tokenizer to a conversation or a list of them.

        Args:
            conversation (`list[dict[str, str]]` or a list of these): Messages with `"role"` and `"content"`.
            chat_template (`str`, *optional*): Another template, or the name of one.
            tokenize (`bool`, *optional*, defaults to `False`): Return the result of `__call__` instead of text.
            add_generation_prompt (`bool`, *optional*):
                Whether the prompt ends with the template's start of a reply, which the SLM writes. Default: `True`,
                unless `continue_final_message` continues the last message.
            return_dict (`bool`, *optional*, defaults to `True`): With `tokenize`, `False` returns `input_ids` alone.
            processor_kwargs (`dict`, *optional*): Arguments of `__call__`.
            kwargs:
                Arguments of the template (`tools`, `documents`, `enable_thinking`, ...). Those of `__call__` are used
                with `tokenize`.
        """
        check_conversations(conversation)
        if unsupported := [name for name in OF_TOKENIZERS if kwargs.pop(name, None)]:
            raise ValueError(
                f"`{unsupported[0]}` is not supported by the processor. Call "
                "`processor.tokenizer.apply_chat_template(..., tokenize=True)`."
            )
        call = {name: kwargs.pop(name) for name in CALL_OPTIONS & kwargs.keys()} | dict(processor_kwargs or {})
        if call.get("return_tensors") == "auto":  # the default of stock processors
            del call["return_tensors"]
        if add_generation_prompt is None:
            add_generation_prompt = not kwargs.get("continue_final_message")
        own = self.chat_template
        if isinstance(own, Mapping):
            own = own.get(chat_template or "default")
            chat_template = own or chat_template
        chats = super().apply_chat_template(
            conversation,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template or own,
            **kwargs,
        )
        if not tokenize:
            return chats
        first = chats if isinstance(chats, str) else chats[0]
        if any(token in first for token in self.tokenizer.all_special_tokens):
            call["add_special_tokens"] = False
        encoded = self(chats, **call)
        return encoded if return_dict else encoded["input_ids"]

    def _limits(
        self, what: str, given: int | None, padding: Any, max_length: int | None, truncation: bool | str | None
    ) -> tuple[int | None, int | None]:
        """Return the length to truncate to and the length to pad to, by the rules of tokenizers."""
        for name, length, least in (
            (f"{what}_max_length", given, 1 + (what == "target")),
            ("max_length", max_length, 1),
        ):
            if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < least):
                raise ValueError(f"`{name}` is {length!r}, but it must be None or an int of at least {least}.")
        if truncation is not None and not isinstance(truncation, bool):
            truncation = TruncationStrategy(truncation).value  # raises `ValueError` for another
        own = getattr(self, f"{what}_max_length")
        longest = given or max_length or own
        if truncation in (False, "do_not_truncate"):
            return NO_LIMIT, longest
        if truncation is None and (max_length is None or padding not in (False, "do_not_pad")):
            return given or own, longest
        part = self.tokenizer if what == "prompt" else self.decoder_tokenizer
        has_limit = part.model_max_length < 1e9  # else it is a huge number
        longest = longest or (part.model_max_length if has_limit else None)
        return longest, longest


CALL_OPTIONS = _names(processing_llm2slm.LLM2SLMProcessor.__call__) | _names(PreTrainedTokenizerBase.__call__)
CALL_OPTIONS |= {*NESTED, "answer_max_length"}
CALL_OPTIONS -= {"text", "add_generation_prompt"}


def _flatten(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without nested ones and those that are `None`, and check their names."""
    for name in NESTED:
        kwargs |= kwargs.pop(name, None) or {}
    options = {name: value for name, value in kwargs.items() if value is not None}
    if unknown := sorted(options.keys() - CALL_OPTIONS - {"add_generation_prompt"}):
        raise TypeError(f"Neither the processor nor a tokenizer takes {', '.join(unknown)}. Leave it out.")
    if unsupported := [name for name in UNSUPPORTED if options.get(name)]:
        raise ValueError(
            f"`{unsupported[0]}` is not supported: each prompt is one text. {UNSUPPORTED[unsupported[0]]}"
        )
    return options


def _width(padding: Any, longest: int | None) -> int | None:
    if padding == "max_length" and longest is None:
        raise ValueError(
            '`padding="max_length"` needs a length: pass `max_length`, or `prompt_max_length` and `target_max_length`.'
        )
    return longest


def as_texts(name: str, texts: Any) -> list[Any] | None:
    """
    Return prompts or targets as a list of texts or of conversations.

    Raises:
        ValueError: If there are none, or if one is something else.
    """
    if texts is None:
        return None
    is_list = isinstance(texts, Iterable) and not isinstance(texts, (bytes, bytearray, Mapping)) and not is_one(texts)
    texts = list(texts) if is_list else [texts]
    if not texts:
        kind = "prompt" if name == "text" else "target"
        raise ValueError(f"`{name}` is an empty list. Pass at least one {kind}.")
    check_texts(name, texts, conversations=name == "text" and not isinstance(texts[0], str))
    return texts


def check_conversations(conversation: Any) -> None:
    """Raise `ValueError` if this is neither a list of messages nor a list of such lists, or has lone surrogates."""
    is_list = isinstance(conversation, (list, tuple)) and not _are_messages(conversation)
    for messages in conversation if is_list else [conversation]:
        if not _are_messages(messages):
            raise ValueError(
                f"`conversation` holds {messages!r:.60}, but it takes lists of messages, such as "
                '`[{"role": "user", "content": "Hello"}]`.'
            )
    check_texts("conversation", conversation)


def _are_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Mapping) for each in value)


def check_texts(name: str, texts: Iterable[Any], conversations: bool = False) -> None:
    """Raise `ValueError` for the first value that is no text (or no conversation), or has lone surrogates."""
    for text in texts:
        if name != "conversation" and not (is_one(text) and isinstance(text, str) != conversations):
            kinds = "texts, or conversations" if name == "text" else "texts"
            are_words = isinstance(text, (list, tuple)) and not _are_messages(text)
            fix = "Join the words into one string." if are_words else "Convert it to text."
            raise ValueError(f"`{name}` holds {text!r:.60}, but it takes {kinds}. {fix}")
        try:
            json.dumps(text, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` holds {text!r:.60}, but {error.object[error.start]!r} is half of a character. Replace it: "
                '`text.encode("utf-8", "replace").decode()`.'
            ) from error
