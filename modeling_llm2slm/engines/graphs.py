"""The modules of an LLM-to-SLM model that an export traces to graphs, each with sample inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..fusion_llm2slm import Cache, Fusion
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration


class PromptGraph(nn.Module):
    """
    Turns prompts `(B, N)`, padded on the side of the fusion's `llm_padding`, into the hidden states `(B, N, d_slm)`
    that the SLM reads; or, with fusion "cache", into packed keys and values, and the logits of the first token.
    """

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.encoder = model.get_encoder()
        # CODEPATH: an encoder-decoder SLM (T5-small) reads the prompt with an encoder of its own.
        self.slm_encoder = model.decoder.get_encoder() if model.config.decoder.is_encoder_decoder else None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        llm, fusion = self.encoder.llm, self.encoder.fusion
        arguments = fusion.llm_arguments(llm, attention_mask)
        outputs = llm(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **arguments)
        if inputs_embeds is None and not fusion.fills_cache:  # else the SLM's table is read, which is in no graph
            inputs_embeds = self.encoder.embed_tokens(input_ids)
        prompt = fusion.combine(self.encoder, fusion.states_of(outputs), inputs_embeds)
        if self.slm_encoder is not None:
            prompt = self.slm_encoder(inputs_embeds=prompt, attention_mask=attention_mask).last_hidden_state
        first = {"first": outputs.logits[:, -1]} if fusion.llm_has_head else {}
        return {"last_hidden_state": prompt, **first}

    def sample(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.full((2, 7), 2), "attention_mask": torch.ones(2, 7).long()}
        if adds_embeddings(self.encoder.fusion):
            inputs["inputs_embeds"] = torch.zeros(2, 7, self.encoder.config.prompt_size)
        return inputs


class StepGraph(nn.Module):
    """Turns the next embeddings `(B, M, d_slm)` of a decoder-only SLM into logits `(B, 1, vocabulary)`."""

    def __init__(self, slm: Any):
        super().__init__()
        self.slm = slm

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: DynamicCache,
    ) -> dict[str, Any]:
        outputs = self.slm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        past, new = 4, 3
        embeds = torch.zeros(2, past + new, self.slm.get_input_embeddings()(torch.tensor([[0]])).shape[-1])
        cache = DynamicCache(config=self.slm.config)
        self.slm(inputs_embeds=embeds[:, :past], past_key_values=cache, use_cache=True)
        return {
            "inputs_embeds": embeds[:, past:].clone(),
            "attention_mask": torch.ones(2, past + new).long(),
            "position_ids": torch.arange(past, past + new).repeat(2, 1),
            "past_key_values": cache,
        }


class CrossGraph(nn.Module):
    """Turns the output of an encoder-decoder SLM's encoder into the keys and values that each step attends to."""

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.slm = model.decoder
        self.size = model.config.prompt_size

    def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Any token fills the cache. Its other results are not returned, so tracing removes them from the graph.
        token = last_hidden_state[:, :1]
        self.slm.get_decoder()(
            inputs_embeds=token, encoder_hidden_states=last_hidden_state, past_key_values=cache, use_cache=True
        )
        return {
            f"{name}_{index}": tensor
            for index, layer in enumerate(cache.cross_attention_cache.layers)
            for name, tensor in (("cross_keys", layer.keys), ("cross_values", layer.values))
        }

    def sample(self) -> dict[str, Any]:
        return {"last_hidden_state": torch.zeros(2, 7, self.size)}


class CrossStepGraph(nn.Module):
    """[`StepGraph`] for an encoder-decoder SLM: `attention_mask` `(B, N)` is the prompt's."""

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.slm = model.decoder
        self.cross = CrossGraph(model)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: DynamicCache,
        **cross: torch.Tensor,
    ) -> dict[str, Any]:
        prompt = DynamicCache()
        for index in range(len(cross) // 2):
            prompt.update(cross[f"cross_keys_{index}"], cross[f"cross_values_{index}"], index)
        cache = EncoderDecoderCache(past_key_values, prompt)
        # The model reads only the width of these: their keys and values are in the cache.
        states = inputs_embeds.new_zeros(*attention_mask.shape, self.cross.size)
        outputs = self.slm(
            decoder_inputs_embeds=inputs_embeds,
            encoder_outputs=(states,),
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return {"logits": outputs.logits[:, -1:], "past_key_values": past_key_values}

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        past, new = 4, 3
        cross = self.cross.sample()["last_hidden_state"]
        embeds = torch.zeros(2, past + new, self.slm.get_input_embeddings()(torch.tensor([[0]])).shape[-1])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.slm.get_decoder()(
            inputs_embeds=embeds[:, :past], encoder_hidden_states=cross, past_key_values=cache, use_cache=True
        )
        return {
            "inputs_embeds": embeds[:, past:].clone(),
            "attention_mask": torch.ones(cross.shape[:2]).long(),
            "past_key_values": cache.self_attention_cache,
            **self.cross(cross),
        }


def adds_embeddings(fusion: Fusion) -> bool:
    """Return whether prompt embeddings contain those of the SLM's table, which is in no graph."""
    return fusion.table == "slm" and not fusion.fills_cache


def graphs_of(model: Any) -> dict[str, Any]:
    """
    Return the modules that become graphs, by name; a decoder-only model of its own has only `step`. Raise `ValueError`
    for a fusion from outside that hands over more than prompt embeddings.
    """
    if not isinstance(model, LLM2SLMForConditionalGeneration):
        return {"step": StepGraph(model)}
    fusion = type(model.encoder.fusion)
    for method in ("read_prompt", "prepend"):
        if not issubclass(fusion, Cache) and getattr(fusion, method) is not getattr(Fusion, method):
            raise ValueError(
                f'`fusion="{fusion.name}"` overrides `{method}`, but exported graphs contain only its `combine`. Use '
                "the PyTorch engine."
            )
    # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
    if model.config.decoder.is_encoder_decoder:
        return {"prompt": PromptGraph(model), "cross": CrossGraph(model), "step": CrossStepGraph(model)}
    return {"prompt": PromptGraph(model), "step": StepGraph(model.decoder)}


def dynamic_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the axes of a graph's inputs that vary: rows and lengths. The exporter then need not infer them."""
    from transformers.exporters.utils import get_leaf_tensors

    def vary(tensor: torch.Tensor) -> dict[int, Any]:
        axes = (0, 2) if tensor.dim() == 4 else (0, 1)  # keys and values are (B, heads, N, width)
        return {axis: torch.export.Dim.AUTO for axis in axes if axis < tensor.dim()}

    return {
        name: vary(value)
        if isinstance(value, torch.Tensor)
        else [vary(tensor) for tensor in get_leaf_tensors(value).values()]
        for name, value in inputs.items()
    }


def embedding_table(slm: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the SLM's embedding of each token `(vocabulary, d_slm)`, scaled where the model scales it (Gemma)."""
    embedding = slm.get_input_embeddings()
    with torch.no_grad():
        return embedding(torch.arange(embedding.num_embeddings)).to(dtype).contiguous()
