"""Fusion "cache" of the installed package: the uploaded one, which also checks that LLM and SLM share their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..cache_llm2slm import PromptStates
from ..fusion_llm2slm import Cache, key_heads


class CheckedCache(Cache):
    """[`Cache`] that compares the LLM and the SLM before a model is built."""

    def prepare(self) -> None:
        if (problem := self._problem()) is not None:
            fix = "Take an SLM that `llm2slm convert cut` made of this LLM, or another fusion."
            raise ValueError(f'`fusion="cache"` is not possible: {problem}. {fix}')
        super().prepare()
        slm_layers, llm_layers = self.config.decoder.num_hidden_layers, self.config.encoder.num_hidden_layers
        if len(self.layers) != slm_layers or not all(0 <= layer < llm_layers for layer in self.layers):
            raise ValueError(
                f"`decoder_layers` is {self.layers}, but must name, for each of the {slm_layers} layers of the SLM, a "
                f"layer of the LLM from 0 to {llm_layers - 1}."
            )
        wanted = _attention(self.config.encoder, self.layers)
        for name, value in _attention(self.config.decoder, range(slm_layers)).items():
            if value != wanted[name]:
                raise ValueError(
                    f"The SLM cannot continue keys and values of the layers {self.layers} of the LLM: {name} is "
                    f"{value} in the SLM, but {wanted[name]} in these layers. Pass the layers it was cut from as "
                    "`decoder_layers`."
                )

    def combine(self, encoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        if hidden_states.shape[-1] != self.config.llm_hidden_size:
            raise ValueError(
                f"`llm_hidden_states` have width {hidden_states.shape[-1]}, but keys and values of the layers "
                f"{self.layers} have {self.config.llm_hidden_size}. Pass what `encode_llm` of this model returns."
            )
        return super().combine(encoder, hidden_states, embeds)

    def read_prompt(self, encoder: Any, *args: Any) -> PromptStates:
        if encoder.training and any(
            getattr(module, "gradient_checkpointing", False) for module in encoder.slm.modules()
        ):
            raise ValueError('Gradient checkpointing drops the cache that `fusion="cache"` fills. Turn it off.')
        return super().read_prompt(encoder, *args)

    def _problem(self) -> str | None:
        config, llm, slm = self.config, self.config.encoder, self.config.decoder
        for part, model in (("LLM", llm), ("SLM", slm)):
            if model.is_encoder_decoder:
                return f"the {part} is a {model.model_type}, and only decoder-only models share keys and values"
        if llm.model_type != slm.model_type:
            return f"the LLM is a {llm.model_type} model, and the SLM a {slm.model_type} model"
        if not config.shared_tokenizer:
            return "LLM and SLM have different tokenizers (`shared_tokenizer=False`)"
        if config.encoder_layer is not None:
            return "`encoder_layer` is set, but `decoder_layers` names the layers that are used"
        if not config.freeze_llm:
            return "an LLM that trains (`freeze_llm=False`) would change the keys and values that the SLM continues"
        if not self.layers:
            return "`decoder_layers` is not set, and the SLM's config does not tell from which layers it was cut"
        return None


def _attention(config: Any, layers: Sequence[int]) -> dict[str, Any]:
    """Return what keys and values of some layers depend on, besides weights."""
    by_layer = {name: getattr(config, name, None) for name in ("layer_types", "attention_layers", "no_rope_layers")}
    found: dict[str, Any] = {name: all_ and [all_[layer] for layer in layers] for name, all_ in by_layer.items()}
    found |= {name: getattr(config, name, None) for name in ("rope_parameters", "rotary_dim", "sliding_window")}
    if kinds := found["layer_types"]:
        rope = found["rope_parameters"] or {}
        found["rope_parameters"] = {kind: rope[kind] for kind in kinds if kind in rope} or rope
        found["sliding_window"] = found["sliding_window"] if "sliding_attention" in kinds else None
    return found | {"number of key heads and head size": key_heads(config)}
