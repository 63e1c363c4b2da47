"""The kinds of models that generate text: encoder-decoder, LLM-to-SLM and decoder-only."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..configuration_llm2slm import check_length
from ..data.conversations import encode_prompts, write_conversations
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
