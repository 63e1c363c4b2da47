# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""Extensions of stock `generate()`: the prompt in the cache, and checks before any compute."""

from dataclasses import replace
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin, StoppingCriteriaList

from .cache_llm2slm import (
    LLM2SLMCache,
    PromptStates,
    as_llm2slm_cache,
    as_prompt_states,
    can_repeat,
    check_continues,
    has_read_prompt,
    mask_and_positions,
)
from .configuration_llm2slm import LLM2SLMConfig
from .parts_llm2slm import check_token_ids


def check_generation(config: LLM2SLMConfig, generation_config: GenerationConfig) -> None:
    """Raise `ValueError` for options that stock generation gets wrong when two models read and write."""
    reasons = {
        "guidance_scale": (1, "runs the SLM alone as if it had no prompt"),
        "prefill_chunk_size": (None, "splits a prompt of token ids, and this one is embedded as a whole"),
    }
    # CODEPATH: two tokenizers. Stock gives these two processors the prompt's ids, which are the LLM's.
    if not config.shared_tokenizer:
        two = "compares prompt and output, which have different vocabularies here"
        reasons |= {"encoder_repetition_penalty": (1, two), "encoder_no_repeat_ngram_size": (0, two)}
    for name, (off, reason) in reasons.items():
        if getattr(generation_config, name, None) not in (None, off):
            raise ValueError(f"`{name}` is not supported: it {reason}. Leave it out.")


def output_tokenizer(config: LLM2SLMConfig, tokenizer: Any, replace_llms: bool) -> Any:
    """Return the SLM's tokenizer for that of a processor. Raise `ValueError` for another tokenizer of the LLM."""
    tokenizer = getattr(tokenizer, "decoder_tokenizer", tokenizer)
    slms, end = getattr(tokenizer, "slm_tokenizer", None), getattr(tokenizer, "eos_token_id", None)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    is_llms = end is not None and end not in ends and end == getattr(config.encoder, "eos_token_id", None)
    if is_llms if slms is None else not replace_llms:
        raise ValueError(
            "The tokenizer is the LLM's, but stop strings and streamers read the output, which is in the SLM's "
            "vocabulary. Pass the processor, or its `decoder_tokenizer`."
        )
    return tokenizer if slms is None else slms


class StopAfterStart(StoppingCriteriaList):
    """
    Criteria that never stop at the start token alone. Up to transformers 5.17 prompt lookup evaluates them there, and
    GPT-2's start token is its end token as well.
    """

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        return done if input_ids.shape[1] > 1 else torch.zeros_like(done)


class LLM2SLMGenerationMixin(GenerationMixin):
    """Hooks of stock `generate()`, in the order it calls them; the loops are transformers' own."""

    @staticmethod
    def reserve(cache: Any) -> Any:
        """Prepare an empty cache; the installed package overrides this to make growing caches faster."""
        return cache

    def _extract_generation_mode_kwargs(self, custom_generate: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        if kwargs.get("tokenizer") is not None:
            kwargs["tokenizer"] = output_tokenizer(self.config, kwargs["tokenizer"], replace_llms=True)
        output_tokenizer(self.config, getattr(args[-1], "tokenizer", None), replace_llms=False)  # the streamer's
        return super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        # `generate()` infers no mask for an encoder and checks lengths after encoding the prompt only: it hands
        # `output_length` on to the encoder, which checks them before any compute.
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        check_generation(self.config, generation_config)
        states, mask = model_kwargs.get("encoder_outputs"), model_kwargs.get("attention_mask")
        start, new = model_kwargs.get("decoder_input_ids"), generation_config.max_new_tokens
        if start is not None:
            check_token_ids("decoder_input_ids", start, "SLM", self.config.vocab_size)
        output_length = (generation_config.max_length or 2) - 1
        if new is not None:
            output_length = new + (start.shape[1] if start is not None else 1) - 1
        if states is not None:
            states = model_kwargs["encoder_outputs"] = as_prompt_states(states, mask, check=True)
            model_kwargs["attention_mask"] = states.attention_mask
            self.encoder.check_prompt(model_kwargs["attention_mask"], output_length)
        elif model_kwargs.get("input_ids") is not None:
            model_kwargs["attention_mask"] = self.encoder.prompt_mask(model_kwargs["input_ids"], mask)
        return generation_config, model_kwargs | {"output_length": output_length}

    def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
        # Without token ids, stock generation takes the SLM's start token for a prompt.
        given = (inputs, model_kwargs.get("input_ids"), model_kwargs.get("encoder_outputs"))
        if all(prompt is None for prompt in given):
            states, mask = model_kwargs.get("llm_hidden_states"), model_kwargs.get("attention_mask")
            prompt = self.get_encoder()(None, mask, states, model_kwargs["output_length"], return_dict=True)
            model_kwargs.update(encoder_outputs=prompt, attention_mask=prompt.attention_mask)
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        return StopAfterStart(super()._get_stopping_criteria(*args, **kwargs))

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        # The mask gets a row for each beam. Stock would expand the states in place; they keep a row for each prompt.
        states = as_prompt_states(kwargs["encoder_outputs"], kwargs.get("attention_mask"))
        kwargs["encoder_outputs"] = PromptStates(attention_mask=states.attention_mask)
        input_ids, kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        return input_ids, kwargs | {
            "encoder_outputs": replace(states, attention_mask=kwargs["encoder_outputs"].attention_mask)
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        for name in ("output_length", "llm_hidden_states"):
            model_kwargs.pop(name, None)  # only the encoder takes them, and it has run
        # The SLM's cache holds the prompt too, and the one that `generate()` sees must not count it.
        # CODEPATH: decoder-only SLMs (GPT-2); encoder-decoder ones (T5-small) keep the prompt in the cross-attention.
        prompt_in_cache = not self.config.decoder.is_encoder_decoder
        if prompt_in_cache:
            prompt = as_prompt_states(model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask"))
            self.encoder.check_prompt(prompt.attention_mask, max_cache_length)
            max_cache_length += self.encoder.mask_before_output(prompt.attention_mask).shape[1]
            if model_kwargs.get("past_key_values") is not None:
                model_kwargs["past_key_values"] = as_llm2slm_cache(model_kwargs["past_key_values"])
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.is_compileable and not self.decoder._can_compile_fullgraph:
            raise ValueError(
                f"A static cache is not supported: transformers computes {type(self.decoder).__name__} wrongly with "
                "one. Leave `cache_implementation` out."
            )
        if cache is not None and given is None:
            cache = self.reserve(cache)
        if prompt_in_cache and cache is not None:
            model_kwargs["past_key_values"] = as_llm2slm_cache(cache)
        if not can_repeat(model_kwargs.get("past_key_values")):
            model_kwargs["encoder_outputs"] = model_kwargs["encoder_outputs"].one_for_each()

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Keep the output's mask 2-D for static caches, so that `forward` can put the prompt's before it."""
        return attention_mask

    def prepare_inputs_for_generation(
        self, input_ids: Any, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """
        Replace the prompt, once it is cached, by positions and a mask of the cache's full length: shapes that are the
        same for every prompt and step, so that a step is compiled once.
        """
        if next_sequence_length is None and past_key_values is not None:
            # The first step of an output or, in an assistant, of a draft. Stock removes cached tokens only if a mask
            # tells how many were given.
            cached = int(past_key_values.get_seq_length())
            if cached >= input_ids.shape[1] and not kwargs.get("is_first_iteration"):
                # In an assistant, transformers up to 5.15 leaves rejected tokens of its last draft in the cache.
                past_key_values.crop(input_ids.shape[1] - 1 - cached)
                cached = input_ids.shape[1] - 1
            check_continues(cached, input_ids.shape[1])
            if cached and kwargs.get("decoder_attention_mask") is None:
                next_sequence_length = input_ids.shape[1] - cached
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )
        if isinstance(past_key_values, LLM2SLMCache) and has_read_prompt(past_key_values):
            prompt = as_prompt_states(model_inputs.pop("encoder_outputs"), model_inputs.pop("attention_mask", None))
            model_inputs["decoder_attention_mask"], model_inputs["decoder_position_ids"] = mask_and_positions(
                self.encoder.mask_before_output(prompt.attention_mask),
                model_inputs.get("decoder_attention_mask"),
                model_inputs["decoder_input_ids"].shape[1],
                past_key_values,
            )
        return model_inputs
