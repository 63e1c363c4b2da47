# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fusions: how the LLM's hidden states of a prompt become what the SLM reads. Each is one class, and nothing else in the
package depends on which one is used. Shapes: batch B, prompt length N, output length M, widths d_llm and d_slm.
"""

import inspect
import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache

from .cache_llm2slm import PromptStates, padding_to, reorder


class Fusion:
    """
    Base class of all fusions. A subclass defines `name` and `description` and overrides `add_modules`, `combine` and
    `initialize`. It holds no weights itself: `add_modules` puts them on the encoder, as `encoder.NAME.*`.

    A fusion that hands over more than embeddings overrides `read_prompt` and `prepend` too: the first may keep keys
    and values in a subclass of [`PromptStates`], the second write them to the SLM's cache. [`Cache`] shows the other
    hooks. Such a fusion is exported only if it extends [`Cache`].
    """

    name: ClassVar[str]  # the value of `LLM2SLMConfig.fusion`
    description: ClassVar[str]  # completes "The SLM ..." in the model card

    fills_cache = False  # whether `prepend` writes to the SLM's cache, which is there in training too
    shared_positions = 0  # 1 if the start token takes the position of the last prompt token
    llm_padding = "right"  # of the LLM's input: GPT-2 and BERT count positions from the first place on

    def __init__(self, config: Any):
        self.config = config
        self.llm_has_head = False  # whether the LLM has its language modeling head
        self.layers: list[int] = config.encoder_layer if isinstance(config.encoder_layer, list) else []  # of H
        self.llm_layer: int | None = max(self.layers, default=config.encoder_layer)  # build none above; `None`: all

    @property
    def table(self) -> str | None:
        """`str`, *optional*: `"slm"` or `"llm"`, whose embedding of the prompt tokens `combine` gets, if any."""
        return None

    def prepare(self) -> None:
        """Complete the config, or raise `ValueError` if it does not fit this fusion."""
        if self.config.decoder_layers is not None:
            raise ValueError(f'`decoder_layers` is for `fusion="cache"`, not for {self.name!r}. Leave it out.')

    def add_modules(self, encoder: Any) -> None:
        """Add the trained modules to a [`LLM2SLMEncoder`] that already holds the LLM."""

    def llm_arguments(self, llm: Any, attention_mask: torch.Tensor) -> dict[str, Any]:
        """Return further arguments of the LLM: by default, not to return a cache, which nothing would read."""
        arguments = {"output_hidden_states": True} if self.layers else {}
        return arguments | ({"use_cache": False} if "use_cache" in inspect.signature(llm.forward).parameters else {})

    def states_size(self, hidden_size: int) -> int:
        """Return the width of H, for the LLM's hidden size."""
        return hidden_size * max(len(self.layers), 1)

    def states_of(self, llm_outputs: Any) -> torch.Tensor:
        """Return H `(B, N, d_llm)`, all that is kept of the LLM's output for training."""
        states = [llm_outputs.hidden_states[layer] for layer in self.layers]
        return torch.cat(states, dim=-1) if states else llm_outputs.last_hidden_state

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
        return PromptStates(embeds, attention_mask, llm_outputs.hidden_states, llm_outputs.attentions)

    def prepend(self, prompt: PromptStates, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return what a decoder-only SLM reads first: P before the embeddings `(B, M, d_slm)` of its own tokens."""
        return torch.cat([prompt.last_hidden_state.to(embeds), embeds], dim=1)

    def first_logits(self, prompt: Any, embeds: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, 1, vocabulary)` of the start token, if `prepend` leaves it out of `embeds`."""
        raise NotImplementedError

    def trained_labels(self, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return labels `(B, K)` of output positions `(K,)`, with -100 where nothing trains."""
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
    """
    Z = W2 act(W1 (H - mean) / scale + b1) + b2: from hidden states `(B, N, d_llm)` to the SLM's embedding space
    `(B, N, d_slm)`. Mean and scale `(d_llm,)` are buffers.
    """

    def __init__(self, config: Any):
        super().__init__()
        sizes = [config.llm_hidden_size, *[config.prompt_size] * config.projector_layers]
        for number, (size_in, size_out) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"linear_{number}", nn.Linear(size_in, size_out))
        self.mean = nn.Buffer(torch.zeros(sizes[0]))
        self.scale = nn.Buffer(torch.ones(sizes[0]))
        self.act = ACT2FN["relu"]

    @property
    def linears(self) -> list[Any]:
        return [module for name, module in self.named_children() if name.startswith("linear_")]  # or their adapters

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first, *others = self.linears
        hidden_states = first(((hidden_states - self.mean) / self.scale).to(first.weight.dtype))
        for linear in others:
            hidden_states = linear(self.act(hidden_states))
        return hidden_states

    def initialize(self, mean: torch.Tensor, scale: torch.Tensor, rms_out: float) -> None:
        """Sample weights that map hidden states of this mean and scale `(d_llm,)` to embeddings of `rms_out`."""
        init.copy_(self.mean, mean)
        init.copy_(self.scale, scale)
        gains = [1.0, *[2**0.5] * (len(self.linears) - 1)]  # ReLU halves the mean square
        gains[-1] *= rms_out
        for linear, gain in zip(self.linears, gains, strict=True):
            init.normal_(linear.weight, std=gain / linear.in_features**0.5)


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
        # With its own embedding, an SLM starts as if it were alone: Z is 0. Else both terms have the same variance.
        scale = 0.0 if self.table == "slm" else embedding_rms(encoder.slm) / 2**0.5
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
class Cache(Fusion):
    """
    The SLM continues the LLM's keys and values of the prompt, in the layers that both share. H packs them: `(B, N,
    layers * 2 * heads * head size)`. The start token takes the position of the last prompt token: its logits are the
    LLM's (`llm_first_token`), or the SLM reads the last prompt token again in its place.
    """

    name = "cache"
    description = "continues the keys and values that the LLM computed for the prompt, in the layers that both share"
    fills_cache, shared_positions, llm_padding = True, 1, "left"

    def __init__(self, config: Any):
        super().__init__(config)
        self.layers = config.decoder_layers or getattr(config.decoder, "cut_from_layers", None) or []
        self.llm_has_head = config.llm_first_token
        self.llm_layer = None if self.llm_has_head else max(self.layers, default=0) + 1

    def states_size(self, hidden_size: int) -> int:
        return len(self.layers) * 2 * math.prod(key_heads(self.config.encoder))

    @property
    def table(self) -> str | None:
        return None if self.config.llm_first_token else "slm"

    def prepare(self) -> None:
        self.config.decoder_layers = self.layers  # the installed package checks them and compares the two models

    def llm_arguments(self, llm: Any, attention_mask: torch.Tensor) -> dict[str, Any]:
        # Without a config, the cache keeps all keys and values of layers with a sliding window too.
        arguments = {"past_key_values": DynamicCache(), "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
        # torch copies a frozen head for each row of a *slice* of states, so an index picks the last position.
        last = {"logits_to_keep": torch.tensor([-1], device=attention_mask.device)} if self.llm_has_head else {}
        return arguments | {"use_cache": True, **last}

    def states_of(self, llm_outputs: Any) -> torch.Tensor:
        picked = [llm_outputs.past_key_values.layers[layer] for layer in self.layers]
        pairs = [part.transpose(1, 2).flatten(2) for layer in picked for part in (layer.keys, layer.values)]
        return torch.cat(pairs, dim=-1)

    def combine(self, encoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        return hidden_states

    def read_prompt(
        self, encoder: Any, llm_outputs: Any, input_ids: Any, attention_mask: torch.Tensor
    ) -> PromptStates:
        prompt = super().read_prompt(encoder, llm_outputs, input_ids, attention_mask)
        if "logits" in llm_outputs:
            prompt.first = llm_outputs["logits"][:, -1]
        elif self.table is not None:
            last = padding_to("left", attention_mask)[:, -1:]
            prompt.first = encoder.embed_tokens(input_ids.gather(1, last))[:, 0]
        return prompt

    def prepend(self, prompt: Any, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        has_first, states = self.config.llm_first_token, prompt.last_hidden_state.to(embeds)
        states = states if has_first else states[:, :-1]
        layers = states.unflatten(-1, (len(self.layers), 2, *key_heads(self.config.encoder)))
        for index, (keys, values) in enumerate(layers.permute(2, 3, 0, 4, 1, 5)):
            if states.shape[1]:  # else the prompt is its last token alone
                cache.self_attention_cache.update(keys, values, index)
        return embeds[:, 1:] if has_first else torch.cat([prompt.first[:, None].to(embeds), embeds[:, 1:]], dim=1)

    def first_logits(self, prompt: Any, embeds: torch.Tensor) -> torch.Tensor:
        size, logits = self.config.vocab_size, prompt.first
        if logits is not None:  # resized embeddings of the SLM have tokens that the LLM does not know
            return nn.functional.pad(logits.to(embeds), (0, size - logits.shape[-1]), value=-torch.inf)[:, None]
        if not embeds.shape[1]:
            raise ValueError(
                "The first output token comes from the LLM's logits, which stored hidden states lack. Load the model "
                "with its LLM and pass `input_ids`, or build it with `llm_first_token=False`."
            )
        return embeds.new_zeros(embeds.shape[0], 1, size)

    def trained_labels(self, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first = (positions == 0).to(labels.device)
        return labels.masked_fill(first, -100) if self.config.llm_first_token else labels


def key_heads(config: Any) -> tuple[int, int]:
    """Return the number of key heads of a decoder-only model, and their size."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size


@torch.no_grad()
def embedding_rms(model: Any) -> float:
    """Return the root mean square of a model's embeddings (Gemma scales them) for up to 4,096 tokens."""
    embedding = model.get_input_embeddings()
    embeds = embedding(probe_ids(embedding.weight, 4096))
    return float(torch.linalg.vector_norm(embeds, dtype=torch.float32)) / embeds.numel() ** 0.5


def probe_ids(table: torch.Tensor, count: int) -> torch.Tensor:
    """Return up to `count` token ids, spread evenly over a vocabulary."""
    step = max(table.shape[0] // count, 1)
    device = None if table.is_meta else table.device  # hooks of offloaded weights move the ids
    return torch.arange(0, table.shape[0], step, device=device)[:count]
