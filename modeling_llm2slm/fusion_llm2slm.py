# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fusions: how the LLM's hidden states of a prompt become what the SLM reads. Each is one class, and nothing else in the
package depends on which one is used. Shapes: batch B, prompt length N, output length M, widths d_llm and d_slm.
"""

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .cache_llm2slm import CachedPromptStates, PickedLayers, PromptStates, padding_to, reorder


class Fusion:
    """
    Base class of all fusions. A subclass defines `name` and `description` and overrides `add_modules`, `combine` and
    `initialize`. It holds no weights itself: `add_modules` puts them on the encoder, as `encoder.NAME.*`.

    A fusion that hands over more than embeddings overrides `read_prompt` and `prepend` too, and cannot be exported:
    the first may keep keys and values in a subclass of [`PromptStates`], the second write them to the SLM's cache.
    [`CacheFusion`] shows the other hooks.
    """

    name: ClassVar[str]  # the value of `LLM2SLMConfig.fusion`
    description: ClassVar[str]  # completes "The SLM ..." in the model card

    fills_cache = False  # whether `prepend` writes to the cache, which a decoder-only SLM then gets in training too
    shared_positions = 0  # positions of the prompt that belong to the output: 1 if the start token takes its last one
    llm_padding = (
        "right"  # side on which the LLM reads padding: GPT-2 and BERT count positions from the first place on
    )
    llm_has_head = False  # whether the LLM is loaded with its language modeling head

    def __init__(self, config: Any):
        self.config = config

    @property
    def llm_layer(self) -> int | None:
        """`int`, *optional*: Number of the LLM's layers that are built, if not all."""
        return self.config.encoder_layer

    @property
    def states_size(self) -> int | None:
        """`int`, *optional*: Width of the LLM's states of a token, if it is not the LLM's hidden size."""
        return None

    def prepare(self) -> None:
        """Complete the configuration, and raise `ValueError` if this fusion cannot work with it."""
        if self.config.decoder_layers is not None:
            raise ValueError(f'`decoder_layers` belongs to `fusion="cache"`, not to {self.name!r}. Leave it out.')

    def llm_arguments(self, attention_mask: torch.Tensor) -> dict[str, Any]:
        """Return further arguments of the LLM's call for prompts with this mask `(B, N)`."""
        return {}

    def states_of(self, llm_outputs: Any) -> torch.Tensor:
        """Return the states H `(B, N, d_llm)` in the LLM's output."""
        return llm_outputs.last_hidden_state

    @property
    def table(self) -> str | None:
        """`str`, *optional*: `"slm"` or `"llm"`, whose embedding of the prompt tokens `combine` gets, if any."""
        return None

    def add_modules(self, encoder: Any) -> None:
        """Add the trained modules to a [`LLM2SLMEncoder`] that already holds the LLM."""

    def combine(self, encoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        """
        Compute the prompt embeddings P `(B, N, d_slm)` from the LLM's hidden states `(B, N, d_llm)` and the prompt
        tokens `(B, N, width)` in `table`. Exported graphs contain this method.
        """
        raise NotImplementedError

    def initialize(self, encoder: Any) -> None:
        """Set the weights of new modules, once LLM and SLM have theirs."""

    def read_prompt(
        self, encoder: Any, llm_outputs: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor
    ) -> PromptStates:
        """
        Turn the LLM's output for prompts `(B, N)` into what the SLM reads. Padding must not stand between prompt and
        output of a decoder-only SLM; an encoder-decoder SLM runs its own encoder over P.
        """
        embeds = self.combine(encoder, llm_outputs.last_hidden_state, encoder.embed_tokens(input_ids))
        has_encoder = self.config.decoder.is_encoder_decoder
        order = padding_to("right" if has_encoder else "left", attention_mask)
        embeds, attention_mask = reorder(embeds, order), reorder(attention_mask, order)
        # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
        if has_encoder:
            slm_encoder = encoder.slm.get_encoder()
            embeds = slm_encoder(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
        return PromptStates(
            last_hidden_state=embeds,
            attention_mask=attention_mask,
            hidden_states=llm_outputs.get("hidden_states"),
            attentions=llm_outputs.get("attentions"),
        )

    def prepend(self, prompt: PromptStates, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return what a decoder-only SLM reads first: P before the embeddings `(B, M, d_slm)` of its own tokens."""
        return torch.cat([prompt.last_hidden_state.to(embeds), embeds], dim=1)

    def first_logits(self, prompt: PromptStates, embeds: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, 1, vocabulary)` of the start token, where `prepend` leaves it out of `embeds`."""
        raise NotImplementedError

    def check_generation(self, prompt: PromptStates) -> None:
        """Raise `ValueError` for a prompt that cannot be continued."""

    def trained_labels(self, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return labels `(B, K)` of these output positions `(K,)`, with -100 where the SLM is not trained."""
        return labels


_FUSIONS: dict[str, type[Fusion]] = {}


def register_fusion(fusion: type[Fusion]) -> type[Fusion]:
    """Make a subclass of [`Fusion`] available as `LLM2SLMConfig(fusion=fusion.name)`; also as a decorator."""
    _FUSIONS[fusion.name] = fusion
    return fusion


def fusion_of(config: Any) -> Fusion:
    """Return the fusion that a [`LLM2SLMConfig`] names. Raise `ValueError` if its name is not registered."""
    if config.fusion not in _FUSIONS:
        raise ValueError(f"`fusion` is {config.fusion!r}, but it must be one of {', '.join(map(repr, _FUSIONS))}.")
    return _FUSIONS[config.fusion](config)


class LLM2SLMProjector(nn.Module):
    """Z = W2 act(W1 H + b1) + b2: from hidden states `(B, N, d_llm)` to the SLM's embedding space `(B, N, d_slm)`."""

    def __init__(self, config: Any):
        super().__init__()
        self.names = [f"linear_{number + 1}" for number in range(config.projector_layers)]
        sizes = [config.llm_hidden_size, *[config.prompt_size] * config.projector_layers]
        for name, size_in, size_out in zip(self.names, sizes, sizes[1:], strict=False):
            self.add_module(name, nn.Linear(size_in, size_out))
        self.act = ACT2FN["relu"]

    @property
    def linears(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.names]  # an adapter may have replaced them

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first, *others = self.linears
        hidden_states = first(hidden_states.to(first.weight.dtype))
        for linear in others:
            hidden_states = linear(self.act(hidden_states))
        return hidden_states

    def initialize(self, mean: torch.Tensor, scale: torch.Tensor, rms_out: float) -> None:
        """Sample weights that map hidden states of this mean and scale `(d_llm,)` to embeddings of `rms_out`."""
        first, *others = self.linears
        gains = [1.0, *[2**0.5] * len(others)]  # ReLU halves the mean square
        gains[-1] *= rms_out
        for linear, gain in zip(self.linears, gains, strict=True):
            init.normal_(linear.weight, std=gain / linear.in_features**0.5)
        init.copy_(first.weight, first.weight / scale.to(first.weight))
        init.copy_(first.bias, -first.weight @ mean.to(first.weight))


@register_fusion
class Add(Fusion):
    """P = E(x) + Z. E is the SLM's embedding if it shares the LLM's tokenizer, else the LLM's and a linear map."""

    name = "add"
    description = "reads the sum of the projected hidden states of the LLM and an embedding of the prompt"

    @property
    def table(self) -> str:
        return "slm" if self.config.shared_tokenizer else "llm"

    def add_modules(self, encoder: Any) -> None:
        encoder.projector = LLM2SLMProjector(self.config)
        if self.table == "llm":
            embedding_size = encoder.llm.get_input_embeddings().embedding_dim
            encoder.prompt_embedding = nn.Linear(embedding_size, self.config.prompt_size, bias=False)

    def combine(self, encoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        assert embeds is not None  # `table` is never None
        if encoder.prompt_embedding is not None:
            embeds = encoder.prompt_embedding(embeds.to(encoder.prompt_embedding.weight.dtype))
        projected = encoder.projector(hidden_states)
        return projected + embeds.to(projected.device)

    def initialize(self, encoder: Any) -> None:
        scale = embedding_rms(encoder.slm) / 2**0.5  # two terms of equal variance
        if encoder.prompt_embedding is not None:
            size = encoder.prompt_embedding.in_features
            init.normal_(encoder.prompt_embedding.weight, std=scale / (embedding_rms(encoder.llm) * size**0.5))
        encoder.projector.initialize(*encoder.hidden_states_scale(), scale)


@register_fusion
class Replace(Fusion):
    """P = Z: the projected hidden states replace the prompt."""

    name = "replace"
    description = "reads the projected hidden states of the LLM in place of the prompt"

    def add_modules(self, encoder: Any) -> None:
        encoder.projector = LLM2SLMProjector(self.config)

    def combine(self, encoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        return encoder.projector(hidden_states)

    def initialize(self, encoder: Any) -> None:
        encoder.projector.initialize(*encoder.hidden_states_scale(), embedding_rms(encoder.slm))


@register_fusion
class CacheFusion(Fusion):
    """
    The SLM's layers are layers of the LLM, and continue the keys and values that those have computed for the prompt:
    H packs them, `(B, N, layers * 2 * heads * head size)`. The start token takes the position of the last prompt
    token. Its logits are the LLM's own (`llm_first_token`), or the SLM reads that token again.
    """

    name = "cache"
    description = "continues the keys and values of the prompt from the layers that it shares with the LLM"
    fills_cache, shared_positions, llm_padding = True, 1, "left"
    _per_layer = ("layer_types", "attention_layers", "no_rope_layers")

    @property
    def llm_has_head(self) -> bool:  # type: ignore[override]
        return self.config.llm_first_token

    @property
    def llm_layer(self) -> int | None:
        return None if self.config.llm_first_token else max(self.config.decoder_layers) + 1

    @property
    def states_size(self) -> int:
        return len(self.config.decoder_layers) * 2 * math.prod(_heads(self.config.encoder))

    @property
    def table(self) -> str | None:
        return None if self.config.llm_first_token else "slm"

    def prepare(self) -> None:
        if self.config.decoder_layers is None:
            self.config.decoder_layers = getattr(self.config.decoder, "cut_from_layers", None)
        if (problem := self._problem()) is not None:
            raise ValueError(f'`fusion="cache"` is not possible: {problem}')

    def _problem(self) -> str | None:
        config, llm, slm, cut = self.config, self.config.encoder, self.config.decoder, self.config.decoder_layers
        for part, of_part in (("LLM", llm), ("SLM", slm)):
            if of_part.is_encoder_decoder:
                return f"the {part} ({of_part.model_type}) is an encoder-decoder. Use another fusion."
        take = "Take an SLM that was cut from this LLM (`llm2slm convert cut`)."
        if llm.model_type != slm.model_type:
            return f"the LLM is a {llm.model_type} and the SLM a {slm.model_type} model. {take}"
        if not config.shared_tokenizer:
            return f"LLM and SLM have different tokenizers (`shared_tokenizer=False`). {take}"
        if config.encoder_layer is not None:
            return "`encoder_layer` is set, but `decoder_layers` names the layers it uses. Leave `encoder_layer` out."
        if not config.freeze_llm:
            return "`freeze_llm=False` would train keys and values away from the SLM's. Leave it out."
        if cut is None:
            return "it is not known which layers the SLM shares. Pass `decoder_layers`, such as [0, 5, 11, 17]."
        if len(cut) != slm.num_hidden_layers or not set(cut) <= set(range(llm.num_hidden_layers)):
            return (
                f"`decoder_layers` is {cut}, but must name a layer of the LLM, 0 to {llm.num_hidden_layers - 1}, for "
                f"each of the {slm.num_hidden_layers} layers of the SLM."
            )
        wanted = self._attention(llm, cut)
        for name, value in self._attention(slm, range(len(cut))).items():
            if value != wanted[name]:
                return f"{name} is {value} in the SLM, but {wanted[name]} in these layers of the LLM. {take}"
        return None

    def _attention(self, config: Any, layers: Collection[int]) -> dict[str, Any]:
        """Return what keys and values of some layers depend on, besides weights."""
        lists = {name: getattr(config, name, None) for name in self._per_layer}
        found: dict[str, Any] = {name: all_ and [all_[index] for index in layers] for name, all_ in lists.items()}
        found["number of key heads and head size"] = _heads(config)
        if "sliding_attention" in (types := found["layer_types"] or ()):
            found["sliding_window"] = config.sliding_window
        rope = getattr(config, "rope_parameters", None) or {}
        by_type = {kind: rope[kind] for kind in types if kind in rope}
        return found | {"rope_parameters": by_type or rope, "rotary_dim": getattr(config, "rotary_dim", None)}

    def llm_arguments(self, attention_mask: torch.Tensor) -> dict[str, Any]:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        kept = {"logits_to_keep": 1} if self.llm_has_head else {}
        cache = PickedLayers(self.config.decoder_layers)
        return {"use_cache": True, "past_key_values": cache, "position_ids": position_ids, **kept}

    def states_of(self, llm_outputs: Any) -> torch.Tensor:
        picked = llm_outputs.past_key_values.picked
        pairs = [picked[layer] for layer in self.config.decoder_layers]
        return torch.cat([part.transpose(1, 2).flatten(2) for pair in pairs for part in pair], dim=-1)

    def read_prompt(
        self, encoder: Any, llm_outputs: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor
    ) -> PromptStates:
        order, states = padding_to("left", attention_mask), llm_outputs.last_hidden_state
        if states.shape[-1] != self.states_size:
            raise ValueError(
                f"The keys and values of a prompt token have width {states.shape[-1]}, but those of the layers "
                f"{self.config.decoder_layers} have {self.states_size}. Pass what `encode_llm` of this model returns."
            )
        embeds, logits = encoder.embed_tokens(input_ids), llm_outputs.get("logits")
        return CachedPromptStates(
            last_hidden_state=reorder(states, order),
            attention_mask=reorder(attention_mask, order),
            hidden_states=llm_outputs.get("hidden_states"),
            attentions=llm_outputs.get("attentions"),
            first_logits=logits if logits is None else logits[:, -1],
            last_embeds=embeds if embeds is None else reorder(embeds, order)[:, -1],
        )

    def prepend(self, prompt: Any, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        first, states = self.config.llm_first_token, prompt.last_hidden_state.to(embeds)
        states = states if first else states[:, :-1]
        layers = states.unflatten(-1, (len(self.config.decoder_layers), 2, *_heads(self.config.encoder)))
        for index, (keys, values) in enumerate(layers.permute(2, 3, 0, 4, 1, 5)):
            if states.shape[1]:
                cache.self_attention_cache.update(keys, values, index)
        return embeds[:, 1:] if first else torch.cat([prompt.last_embeds[:, None].to(embeds), embeds[:, 1:]], dim=1)

    def first_logits(self, prompt: Any, embeds: torch.Tensor) -> torch.Tensor:
        size, logits = self.config.vocab_size, getattr(prompt, "first_logits", None)
        if logits is None:
            return embeds.new_zeros(embeds.shape[0], 1, size)
        # An SLM whose embeddings were resized has tokens that the LLM does not know.
        return nn.functional.pad(logits.to(embeds), (0, size - logits.shape[-1]), value=-torch.inf)[:, None]

    def check_generation(self, prompt: Any) -> None:
        if self.config.llm_first_token and getattr(prompt, "first_logits", None) is None:
            raise ValueError(
                "The first output token comes from the LLM's logits, which stored hidden states lack. Load the model "
                "with its LLM and pass `input_ids`, or build it with `llm_first_token=False`."
            )

    def trained_labels(self, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        is_first = (positions == 0).to(labels.device)
        return labels.masked_fill(is_first, -100) if self.config.llm_first_token else labels


def _heads(config: Any) -> tuple[int, int]:
    """Return the number of key heads of a decoder-only model, and their size."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size


def rms(values: Any) -> float:
    """Return the root mean square of a tensor."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float32)) / values.numel() ** 0.5


@torch.no_grad()
def embedding_rms(model: Any) -> float:
    """Return the root mean square of a model's embeddings (Gemma scales them) for up to 4,096 tokens."""
    embedding = model.get_input_embeddings()
    return rms(embedding(probe_ids(embedding.weight, 4096)))


def probe_ids(table: torch.Tensor, count: int) -> torch.Tensor:
    """Return up to `count` token ids, spread evenly over a vocabulary."""
    step = max(table.shape[0] // count, 1)
    device = None if table.is_meta else table.device  # hooks of offloaded weights move the ids
    return torch.arange(0, table.shape[0], step, device=device)[:count]
