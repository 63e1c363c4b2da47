# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""State of an LLM-to-SLM model between steps: the prompt as the SLM reads it, the SLM's cache, masks, positions."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import ModelOutput


NO_PROMPT = "There is no prompt: pass `input_ids`, `llm_hidden_states` or `encoder_outputs`."


@dataclass
class PromptStates(ModelOutput):
    """
    A prompt as the SLM reads it: `encode_prompt` returns it, and `encoder_outputs=` takes it any number of
    times. A fusion may add tensors in a subclass, each with a row for each prompt.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, N, d_slm)`):
            The prompt embeddings P, padded on the left; for an encoder-decoder SLM, its own encoder's output.
        attention_mask (`torch.LongTensor` of shape `(B, N)`):
            0 on padding. Within `generate()` it has a row for each beam or sample; those of a prompt are adjacent.
        hidden_states (`tuple(torch.Tensor)`, *optional*): The LLM's, if requested, in the layout of its input.
        attentions (`tuple(torch.Tensor)`, *optional*): The LLM's, likewise.
        first (`torch.Tensor`, *optional*):
            With `fusion="cache"`, the LLM's logits `(B, vocabulary)` of the first output token; or, without
            `llm_first_token`, the SLM's embedding `(B, d_slm)` of the last prompt token.
    """

    # `generate()` expands tensors in the output of `get_encoder()` for beams, so the mask travels with the states.
    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]
    attention_mask: torch.Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    first: torch.Tensor | None = None

    # `torch.load` reads saved states with its defaults: it knows the class, and sets no items of a dictionary.
    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        torch.serialization.add_safe_globals([cls])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def copies(self) -> int:
        """`int`: Number of beams or samples of each prompt."""
        return self.attention_mask.shape[0] // self.last_hidden_state.shape[0]

    def one_of_each(self) -> "PromptStates":
        """Return each prompt once, whatever the number of its beams."""
        return replace(self, attention_mask=self.attention_mask[:: self.copies])

    def one_for_each(self) -> "PromptStates":
        """Return the states of each prompt repeated for each of its beams."""
        new: Any = {key: one.repeat_interleave(self.copies, 0) for key, one in self.items() if torch.is_tensor(one)}
        return replace(self, **new | {"attention_mask": self.attention_mask})


torch.serialization.add_safe_globals([PromptStates])


def as_prompt_states(
    encoder_outputs: PromptStates | ModelOutput | tuple, attention_mask: torch.Tensor | None, check: bool = False
) -> PromptStates:
    """Return `encode_prompt`'s output itself, or a bare `last_hidden_state` with its mask as `PromptStates`."""
    if not encoder_outputs or encoder_outputs[0] is None or not encoder_outputs[0].numel():
        raise ValueError(NO_PROMPT)
    states, own_mask = encoder_outputs[0], getattr(encoder_outputs, "attention_mask", None)
    optional = [getattr(encoder_outputs, name, None) for name in ("hidden_states", "attentions")]
    if own_mask is None:
        ones = states.new_ones(states.shape[:2], dtype=torch.long)
        return PromptStates(states, ones if attention_mask is None else attention_mask, *optional)
    if check and attention_mask is not None:
        given = (attention_mask != 0).sum(-1).to(own_mask.device)
        if attention_mask.shape != own_mask.shape or not torch.equal(given, own_mask.sum(-1)):
            raise ValueError(
                "`attention_mask` and `encoder_outputs` belong to different prompts: their numbers of tokens differ. "
                "Pass the mask that went into `encode_prompt`, or none."
            )
    return encoder_outputs if isinstance(encoder_outputs, PromptStates) else PromptStates(states, own_mask, *optional)


def repeat_outputs(outputs: ModelOutput, copies: int) -> ModelOutput:
    """Repeat each row of the SLM's output, its cache included, once for each beam."""

    def repeat(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(repeat, value))
        return value.repeat_interleave(copies, dim=0) if isinstance(value, torch.Tensor) else value

    outputs.past_key_values.batch_repeat_interleave(copies)
    return type(outputs)(**{name: repeat(value) for name, value in outputs.items()})


def select_layers(states: Any, requested: Any) -> Any:
    """Return hidden states with `None` for those that indices do not request, as transformers 5.23 does."""
    if not states or not requested or requested is True:
        return states
    indices, count = [requested] if isinstance(requested, int) else requested, len(states)
    kept = [index % count for index in indices if -count <= index < count]
    return tuple(layer if index in kept else None for index, layer in enumerate(states))


def padding_to(side: str, mask: torch.Tensor) -> torch.Tensor:
    """Return the order `(B, N)` that moves the padding of a mask to the `"left"` or `"right"`; tokens keep theirs."""
    return mask.argsort(dim=-1, descending=side == "right", stable=True)


def reorder(values: torch.Tensor, order: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Reorder dimension `dim`, the prompt's N, of each row by its own order `(B, N)`."""
    shape = [size if axis in (0, dim) else 1 for axis, size in enumerate(values.shape)]
    return values.gather(dim, order.to(values.device).view(shape).expand_as(values))


class LLM2SLMCache(EncoderDecoderCache):
    """
    The SLM's cache as `generate()` and callers see it: it counts output tokens only. The SLM itself works on
    `self_attention_cache`, which begins with the `prompt_length` positions of the prompt.
    """

    def __init__(self, slm_cache: Cache):
        super().__init__(slm_cache, DynamicCache())
        self.prompt_length = 0  # what the cache holds before the output, once it holds the prompt

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.self_attention_cache.get_seq_length(layer_idx) - self.prompt_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the capacity for output tokens, or -1 if the cache grows."""
        max_length = self.self_attention_cache.get_max_length(layer_idx)
        return max_length - self.prompt_length if max_length > 0 else max_length

    def reset(self) -> None:
        super().reset()
        self.prompt_length = 0


def as_llm2slm_cache(cache: Cache | None) -> LLM2SLMCache | None:
    """Wrap an empty cache of any class in a [`LLM2SLMCache`]."""
    if cache is None or isinstance(cache, LLM2SLMCache):
        return cache
    slm_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if slm_cache.get_seq_length() > 0:
        raise ValueError(
            "`past_key_values` holds tokens of another model. Pass one that this model returned, or an empty one."
        )
    return LLM2SLMCache(slm_cache)


def can_repeat(cache: Cache | None) -> bool:
    """Return whether the rows of a cache can be repeated for beams; those of a static one cannot."""
    return isinstance(cache, EncoderDecoderCache) and all(
        type(part) is DynamicCache for part in (cache.self_attention_cache, cache.cross_attention_cache)
    )


def has_read_prompt(cache: Cache | None) -> bool:
    """Return whether a cache holds the prompt, before the output or in the cross-attention."""
    if isinstance(cache, LLM2SLMCache):
        return cache.prompt_length > 0 or int(cache.get_seq_length()) > 0  # 0 before the output of `fusion="cache"`
    return bool(getattr(cache, "is_updated", {}).get(0))


def check_continues(cached: int, given: int) -> None:
    """Raise `ValueError` if a cache of `cached` output tokens holds all of the `given` ones."""
    if cached >= given:
        raise ValueError(
            f"`past_key_values` holds {cached} output tokens and `decoder_input_ids` has no more than {given}. Pass "
            "the output from its start, with a token that is not cached yet."
        )


def check_prompt_width(cache: Cache | None, width: int) -> None:
    """Raise `ValueError` if a cache holds a prompt, before the output or in the cross-attention, of another width."""
    cached = width
    if isinstance(cache, LLM2SLMCache):
        cached = cache.prompt_length
    elif isinstance(cache, EncoderDecoderCache) and isinstance(cache.cross_attention_cache, DynamicCache):
        cached = cache.cross_attention_cache.get_seq_length() or width  # 0 before the first step
    if cached != width:
        raise ValueError(
            f"`past_key_values` begins with a prompt of width {cached}, but this one has {width}. Pass the prompt as "
            "it was padded when the cache was made."
        )


def labels_mask(labels: torch.Tensor) -> torch.Tensor:
    """Return 1 for each position of `labels` `(B, M)` up to the last that is not -100, and 0 for the padding after."""
    return (labels != -100).long().flip(-1).cummax(-1).values.flip(-1)


def mask_and_positions(
    prompt_mask: torch.Tensor, output_mask: torch.Tensor | None, output_length: int, cache: LLM2SLMCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the SLM's mask over prompt, cached output and `output_length` new tokens (up to the end of a static cache),
    and the positions of what it reads now: the new tokens, and the prompt if it is not cached yet. Padding takes none.
    """
    cache = cache if has_read_prompt(cache) else None
    check_prompt_width(cache, prompt_mask.shape[1])
    past_length = int(cache.get_seq_length()) if cache is not None else 0
    if output_mask is None:
        output_mask = prompt_mask.new_ones(prompt_mask.shape[0], past_length + output_length)
    elif output_mask.shape[1] != past_length + output_length:
        raise ValueError(
            f"`decoder_attention_mask` has width {output_mask.shape[1]}. Pass one of width "
            f"{past_length + output_length}, over the {past_length} output tokens in `past_key_values` and the "
            f"{output_length} in `decoder_input_ids`."
        )
    mask = torch.cat([prompt_mask, output_mask.to(prompt_mask)], dim=-1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    if cache is not None:
        # With the strides of the mask, a compiled step would be compiled again for each length.
        position_ids = position_ids[:, -output_length:].clone(memory_format=torch.contiguous_format)
        if cache.is_compileable:
            # If all layers have a sliding window, the cache has its length, and the mask may be longer.
            rest = max(cache.self_attention_cache.get_max_length() - mask.shape[1], 0)
            mask = nn.functional.pad(mask, (0, rest), value=1)  # causality hides positions not written yet
    return mask, position_ids
