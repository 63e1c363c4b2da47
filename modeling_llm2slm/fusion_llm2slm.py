# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fusions: how the LLM's hidden states of a prompt become what the SLM reads. Each is one class, and nothing else in the
package depends on which one is used. Shapes: batch B, prompt length N, output length M, widths d_llm and d_slm.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .cache_llm2slm import PromptStates, padding_to, reorder


class Fusion:
    """
    Base class of all fusions. A subclass defines `name` and `description` and overrides `add_modules`, `combine` and
    `initialize`. It holds no weights itself: `add_modules` puts them on the encoder, as `encoder.NAME.*`.

    A fusion that hands over more than embeddings overrides `read_prompt` and `prepend` too, and cannot be exported:
    the first may keep keys and values in a subclass of [`PromptStates`], the second write them to the SLM's cache.
    """

    name: ClassVar[str]  # the value of `LLM2SLMConfig.fusion`
    description: ClassVar[str]  # completes "The SLM ..." in the model card

    def __init__(self, config: Any):
        self.config = config

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
    return torch.arange(0, table.shape[0], step, device=table.device)[:count]
