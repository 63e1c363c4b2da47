"""Decoder-only models as graphs of an engine other than PyTorch, written by `llm2slm export`: an LLM or SLM alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache_llm2slm import check_continues
from ..inference.families import DecoderOnlyTextToText
from .exported import ExportedCache, ExportedText, GraphModel


class ExportedLLMCache(ExportedCache):
    """The cache of a decoder-only model, which counts prompt and output. The prompt is the first that was read."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far."""
        return 0 if self.prompt_mask is None else self.prompt_mask.shape[1] + self.output_length


class ExportedLLM(GraphModel):
    """
    A decoder-only model on an engine other than PyTorch, with transformers' `generate()`, which returns prompt and
    output. It is restricted as [`ExportedLLM2SLM`] is.

    Its graph `step` reads prompts `(B, N)` and then token by token; an engine may compile it a second time, as
    `prompt`, with other precisions.
    """

    cache_class = ExportedLLMCache

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ExportedCache | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """
        Return the logits `(B, 1, vocabulary)` of the next token, and the cache to continue with.

        Args:
            input_ids: The tokens `(B, N)` that are not in the cache yet.
            attention_mask: 1 on tokens, 0 on padding `(B, N)`, for the prompt, which is read first. Default: no
                padding.
            past_key_values: From an earlier call.
            return_dict: Always true.
        """
        cache = past_key_values if past_key_values is not None else self.new_cache()
        if cache.prompt_mask is not None:
            new, read = input_ids.shape[1], input_ids.shape[1]
        else:
            input_ids = input_ids[:: cache.repeats]  # rows of the same prompt have the same first step
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:: cache.repeats]
            cache.prompt_mask, new, read = (mask != 0).long(), 0, input_ids.shape[1]
        mask, position_ids = cache.mask_and_positions(new, read)
        inputs = {"inputs_embeds": self._embed(input_ids), "attention_mask": mask, "position_ids": position_ids}
        if not new and "prompt" in self.graphs:
            reader = self.graphs["prompt"].new_state()
            logits = reader.run(inputs, None)
            reader.hand_over(cache.state)
        else:
            logits = cache.run(inputs)
        cache.output_length += new
        if not new and cache.repeats > 1:
            cache.expand()
            logits = logits.repeat_interleave(cache.repeats, dim=0)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        cache, mask = self._set_cache(generation_config, model_kwargs), model_kwargs.get("attention_mask")
        if cache.prompt_mask is not None and mask is not None and not mask[:, cache.prompt_mask.shape[1] :].all():
            raise ValueError("`attention_mask` hides tokens after the first prompt. Pad only the first prompt.")

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hook of `generate()`: pass the tokens that are not in the cache yet."""
        cached = past_key_values.get_seq_length()
        check_continues(cached, input_ids.shape[1])
        return {
            "input_ids": input_ids[:, cached:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }


class ExportedLLMTextToText(ExportedText, DecoderOnlyTextToText):
    """A decoder-only model that `llm2slm export` wrote for an engine other than PyTorch."""


__all__ = ["ExportedLLM", "ExportedLLMCache", "ExportedLLMTextToText"]
