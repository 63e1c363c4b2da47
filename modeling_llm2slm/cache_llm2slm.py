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
"""The cache of an LLM-to-SLM model, and the masks and positions that go with it."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache


class ReservingLayer(DynamicLayer):
    """
    A layer that writes new keys and values behind the old ones, in room reserved for more; stock copies all of them at
    each step, and in a batch of long prompts that takes longer than the arithmetic.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.room: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and key_states.requires_grad:  # a gradient needs the old ones as they were
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._append("keys", self.keys, key_states, length)
        self.values = self._append("values", self.values, value_states, length)
        return self.keys, self.values

    def _append(self, name: str, old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        end, room = length + new.shape[-2], self.room.get(name)
        # Rows may have been reordered or repeated since, which makes them anew and without room.
        if room is None or room.data_ptr() != old.data_ptr() or len(room) != len(new) or room.shape[-2] < end:
            room = self.room[name] = new.new_empty(*new.shape[:-2], end + max(end // 2, 32), new.shape[-1])
            if length:
                room[..., :length, :] = old
        room[..., length:end, :] = new
        return room[..., :end, :]


def with_room(cache: Cache) -> Cache:
    """The same cache, still empty, with layers that keep room for more where stock ones would copy."""
    growing = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if type(growing) is DynamicCache and not growing.offloading:
        growing.layers = [ReservingLayer() if type(layer) is DynamicLayer else layer for layer in growing.layers]
    return cache


class LLM2SLMCache(EncoderDecoderCache):
    """
    The SLM's cache as `generate()` and callers see it: it counts answer tokens only. The SLM itself works on
    `self_attention_cache`, which begins with the `prompt_length` positions of the prompt.
    """

    def __init__(self, slm_cache: Cache):
        super().__init__(slm_cache, DynamicCache())
        self.prompt_length = 0  # N once the SLM has read the prompt

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.self_attention_cache.get_seq_length(layer_idx) - self.prompt_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Room for answer tokens; -1 where it grows."""
        max_length = self.self_attention_cache.get_max_length(layer_idx)
        return max_length - self.prompt_length if max_length > 0 else max_length

    def reset(self) -> None:
        super().reset()
        self.prompt_length = 0


def as_llm2slm_cache(cache: Cache | None) -> LLM2SLMCache | None:
    """Any empty cache as one that tells prompt and answer apart."""
    if cache is None or isinstance(cache, LLM2SLMCache):
        return cache
    slm_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if slm_cache.get_seq_length() > 0:
        raise ValueError(
            "`past_key_values` holds tokens of another model. Pass one that this model returned, or an empty one."
        )
    return LLM2SLMCache(slm_cache)


def can_repeat(cache: Cache | None) -> bool:
    """Whether each row of a cache can be repeated for beams; a static one has its size from the start."""
    return isinstance(cache, EncoderDecoderCache) and all(
        type(part) is DynamicCache for part in (cache.self_attention_cache, cache.cross_attention_cache)
    )


def has_read_prompt(cache: Cache | None) -> bool:
    """Whether the SLM has read the prompt of a cache, before the answer or in its cross-attention."""
    if isinstance(cache, LLM2SLMCache):
        return cache.prompt_length > 0
    return bool(getattr(cache, "is_updated", {}).get(0))


def check_goes_on(cached: int, given: int) -> None:
    """Raise `ValueError` where a cache holds all of the answer so far, so that there is nothing to go on with."""
    if cached >= given:
        raise ValueError(
            f"`past_key_values` holds {cached} answer tokens and `decoder_input_ids` has no more than {given}. Pass "
            "the answer from its start, with a token that is not cached yet."
        )


def check_cross_attention(cache: Cache | None, width: int) -> None:
    """Raise `ValueError` where the cache of an encoder-decoder SLM was made for prompts of another width."""
    if isinstance(cache, EncoderDecoderCache) and isinstance(cache.cross_attention_cache, DynamicCache):
        cached = cache.cross_attention_cache.get_seq_length()
        if cached:
            _check_width(cached, width)


def _check_width(cached: int, width: int) -> None:
    if cached != width:
        raise ValueError(
            f"`past_key_values` begins with a prompt of width {cached}, but this one has {width}. Pass the prompt as "
            "it was padded when the cache was made."
        )


def labels_mask(labels: torch.Tensor) -> torch.Tensor:
    """1 for every place of `labels` `(B, M)` up to the last that is not -100, 0 for the padding behind."""
    return (labels != -100).long().flip(-1).cummax(-1).values.flip(-1)


def mask_and_positions(
    prompt_mask: torch.Tensor, output_mask: torch.Tensor | None, output_length: int, cache: LLM2SLMCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The SLM's mask over prompt, cached answer and `output_length` new tokens (up to the end of a static cache), and the
    positions of what it reads now: of the new tokens, and of the prompt if that is not cached yet. Padding has none.
    """
    cache = cache if cache is not None and cache.prompt_length > 0 else None
    if cache is not None:
        _check_width(cache.prompt_length, prompt_mask.shape[1])
    past_length = int(cache.get_seq_length()) if cache is not None else 0
    if output_mask is None:
        output_mask = prompt_mask.new_ones(prompt_mask.shape[0], past_length + output_length)
    elif output_mask.shape[1] != past_length + output_length:
        raise ValueError(
            f"`decoder_attention_mask` has width {output_mask.shape[1]}. Pass one of width "
            f"{past_length + output_length}, over the {past_length} answer tokens in `past_key_values` and the "
            f"{output_length} in `decoder_input_ids`."
        )
    mask = torch.cat([prompt_mask, output_mask.to(prompt_mask)], dim=-1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    if cache is not None:
        # Strides of its own: with those of the mask a compiled step would be compiled anew for another length.
        position_ids = position_ids[:, -output_length:].clone(memory_format=torch.contiguous_format)
        if cache.is_compileable:
            # If all layers have a sliding window, the cache has its length, and the mask may be longer.
            rest = max(cache.self_attention_cache.get_max_length() - mask.shape[1], 0)
            mask = nn.functional.pad(mask, (0, rest), value=1)  # causality hides what is not written yet
    return mask, position_ids
