"""The kinds of models that generate text: encoder-decoder, LLM-to-SLM and decoder-only."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

from ..configuration_llm2slm import check_length
from ..data.collator import DataCollatorForLLM2SLM, DataCollatorForTargets
from ..data.conversations import encode_prompts, write_conversations
from .parts import Part, composite_parts
from .text_to_text import Features, TextToText


logger = logging.getLogger(__name__)


class EncoderDecoderTextToText(TextToText):
    """An encoder-decoder model, such as a T5."""

    def features(self, prompts: list[str], targets: list[str] | None = None) -> Features:
        features = {"input_ids": encode_prompts(self.processor, prompts, self._encode_prompt_ids)}
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

    def _encode_prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        texts, options = write_conversations(self.processor, prompts)
        return self._encode("prompts", self.prompt_max_length, text=texts, **options)

    def _encode(self, what: str, max_length: int | None, **texts: Any) -> list[list[int]]:
        ids = self.processor(**texts, verbose=False)["input_ids"]
        if not _warn_of_truncation(what, ids, max_length):
            return ids
        return self.processor(**texts, truncation=True, max_length=max_length)["input_ids"]


class LLM2SLMTextToText(EncoderDecoderTextToText):
    """An LLM-to-SLM model with its [`LLM2SLMProcessor`], which truncates prompts and targets."""

    is_llm2slm = True

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
        features = {"input_ids": encode_prompts(self.processor, prompts, self._encode_prompt_ids)}
        features["attention_mask"] = [[1] * len(ids) for ids in features["input_ids"]]
        if targets is not None:
            features["labels"] = self.processor(text_target=list(targets))["labels"]
        return features

    def _encode_prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        return self.processor(text=prompts)["input_ids"]

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
            return f"has {len(input_ids) + len(labels)} tokens, but the SLM has {self.max_positions} positions"
        return None


class DecoderOnlyTextToText(TextToText):
    """
    A decoder-only model. It continues its prompt: `[start] [prompt] [target] [end]`, if its tokenizer begins a text
    with a start token, as those of Gemma and Llama do, or if the prompt is a conversation. Otherwise, as for GPT-2, a
    separator marks where the prompt ends: `[prompt] [separator] [target] [end]`.

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
        end = self.tokenizer.eos_token_id
        inputs = encode_prompts(self.tokenizer, prompts, self._encode_prompts)
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
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"Prompt and output have {length} tokens together, but the model has {self.max_positions} positions. "
                "Set prompt_max_length, target_max_length or max_new_tokens."
            )

    def _problem(self, input_ids: list[int], labels: list[int]) -> str | None:
        if self.max_positions is None or len(input_ids) <= self.max_positions:
            return None
        return f"has {len(input_ids)} tokens, but the model has {self.max_positions} positions"

    def _outputs(self, generated: torch.Tensor, inputs: Any) -> torch.Tensor:
        return generated[:, inputs["input_ids"].shape[1] :]

    def _encode_prompts(self, prompts: list[Any]) -> list[list[int]]:
        texts, special = write_conversations(self.tokenizer, prompts)
        start, limit = self.tokenizer.bos_token_id, self.prompt_max_length
        if not special.get("add_special_tokens", True):  # a chat template marks where a prompt begins and ends
            return self._encode("prompts", texts, limit)
        if start is not None and self.tokenizer("").input_ids[:1] == [start]:
            limit = None if limit is None else limit - 1  # as in an LLM-to-SLM processor, it counts the start token
            return [[start, *ids] for ids in self._encode("prompts", texts, limit)]
        separator = self.tokenizer.eos_token_id if start is None else start
        return [[*ids, separator] for ids in self._encode("prompts", texts, limit)]

    def _encode(self, what: str, texts: list[str], max_length: int | None) -> list[list[int]]:
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        _warn_of_truncation(what, ids, max_length)
        return [row[:max_length] for row in ids]


def _warn_of_truncation(what: str, rows: list[list[int]], max_length: int | None) -> bool:
    """Warn of texts that are truncated, and return whether there are any."""
    cut = 0 if max_length is None else sum(len(row) > max_length for row in rows)
    if cut:
        logger.warning(f"{cut} of {len(rows)} {what} are longer than {max_length} tokens and were truncated.")
    return cut > 0
