"""A KV cache that reserves memory for further tokens, for long prompts in large batches."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache


class ReservingLayer(DynamicLayer):
    """
    A cache layer that reserves memory for further tokens and writes them in place. The stock layer copies all keys and
    values at each step, which takes longer than the arithmetic in a batch of long prompts.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.reserved: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and key_states.requires_grad:  # the backward pass needs the old values unchanged
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._append("keys", self.keys, key_states, length)
        self.values = self._append("values", self.values, value_states, length)
        return self.keys, self.values

    def _append(self, name: str, old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        end, whole = length + new.shape[-2], self.reserved.get(name)
        # Reordering or repeating rows replaces the tensors, and the new ones have no reserve.
        if whole is None or whole.data_ptr() != old.data_ptr() or len(whole) != len(new) or whole.shape[-2] < end:
            whole = self.reserved[name] = new.new_empty(*new.shape[:-2], end + max(end // 2, 32), new.shape[-1])
            if length:
                whole[..., :length, :] = old
        whole[..., length:end, :] = new
        return whole[..., :end, :]


def with_reserve(cache: Cache) -> Cache:
    """Replace the stock layers of an empty dynamic cache by [`ReservingLayer`]s."""
    growing = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if type(growing) is DynamicCache and not growing.offloading:
        growing.layers = [ReservingLayer() if type(layer) is DynamicLayer else layer for layer in growing.layers]
    return cache
