"""
A checkpoint with fusion `"cache"` as a model of vLLM that holds LLM and SLM, see `vllm_plugin.py`.

To vLLM the vocabulary has `2 * V` ids, where V is the SLM's vocabulary: those of output tokens, and from V on those of
the prompt tokens that the LLM reads. So each token of a step says which part reads it, also where a request is
computed again after it was preempted, and a prompt never matches cached blocks with tokens that the SLM wrote.

Both parts are vLLM's own classes. Each reads its own tokens of a step only: rows of the hidden states. Attention works
on all rows, as vLLM's metadata describe the whole step. The SLM's layers have no KV cache of their own but write to
those of the LLM's layers that they continue.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)

from ..fusion_llm2slm import fusion_of
from ..inference.model import LLM2SLMForConditionalGeneration
from .vllm_model import PromptRenderer, processor_of


class MarkedPromptRenderer(PromptRenderer):
    """Gives the prompt tokens that the LLM reads their own ids."""

    def _tokenize_singleton_prompt(self, prompt: Any, params: Any) -> Any:
        if "prompt_embeds" in prompt or prompt.get("multi_modal_data"):
            raise ValueError("The model reads text or token ids. Leave out everything else.")
        config, ids = self.model_config.hf_config, prompt.get("prompt_token_ids")
        if ids is None:
            processor = processor_of(self.model_config.model, self.model_config.revision)
            ids = processor(text=prompt["prompt"])["input_ids"]
        rendered = params.apply_post_tokenization(self.tokenizer, {**prompt, "prompt_token_ids": list(ids)})
        ids = rendered["prompt_token_ids"]
        if not ids:
            raise ValueError("The prompt is empty.")
        config.check_llm_length(len(ids))
        if not 0 <= min(ids) <= max(ids) < (size := config.encoder.vocab_size):
            raise ValueError(f"The prompt holds a token id that is not in the LLM's vocabulary of {size}.")
        return {**rendered, "prompt_token_ids": mark(config, ids)}


def mark(config: Any, ids: list[int]) -> list[int]:
    """Return the ids that vLLM has for prompt tokens. The SLM may read the last one in place of a start token."""
    read_by_llm = len(ids) if config.llm_first_token else len(ids) - 1
    return [config.vocab_size + token for token in ids[:read_by_llm]] + ids[read_by_llm:]


class Rows:
    """The number of tokens of the current step, and which of them one part reads; `None` stands for all."""

    tokens = 0
    index: torch.Tensor | None = None


@functools.cache
def reading_rows(attention: Any) -> Any:
    """
    Return a subclass of vLLM's attention of a layer that reads keys and values of some tokens of a step. The queries
    of all others are zeros, and what is computed for them is dropped.
    """

    class RowsAttention(attention):
        rows: Rows

        def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: torch.Tensor) -> None:
            slots = slots if self.rows.index is None else slots[self.rows.index]
            super().do_kv_cache_update(layer, key, value, kv_cache, slots)

        def forward(
            self, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: Any, metadata: Any,
            output: torch.Tensor, **kwargs: Any,
        ) -> torch.Tensor:  # fmt: skip
            index = self.rows.index
            if metadata is not None and layer.kv_sharing_target_layer_name is not None:
                # vLLM expects that a layer without a KV cache of its own never writes.
                slots = get_forward_context().slot_mapping[layer.layer_name]
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
            if metadata is None or index is None:
                return super().forward(layer, query, key, value, kv_cache, metadata, output, **kwargs)
            queries, outputs = (one.new_zeros(self.rows.tokens, *one.shape[1:]) for one in (query, output))
            queries[index] = query
            super().forward(layer, queries, key, value, kv_cache, metadata, outputs, **kwargs)
            return output.copy_(outputs[index])

    return RowsAttention


class VLLMLLM2SLMCache(nn.Module):
    """The LLM, which reads the prompt, and the SLM, which continues the keys and values of some of its layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.model_config = vllm_config.model_config
        config = self.model_config.hf_config
        self.size, self.llm_size = config.vocab_size, config.encoder.vocab_size
        self.has_head = config.llm_first_token
        self.llm = _part(vllm_config, config.llm_part, maybe_prefix(prefix, "llm"))
        self.slm = _part(vllm_config, config.decoder, maybe_prefix(prefix, "slm"))
        self.llm_rows, self.slm_rows = Rows(), Rows()
        llm_layers, slm_layers = _read_rows(self.llm, self.llm_rows), _read_rows(self.slm, self.slm_rows)
        for layer, shared in zip(slm_layers, fusion_of(config).layers, strict=True):
            layer.kv_sharing_target_layer_name = llm_layers[shared].layer_name

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load both parts as vLLM does; the LLM of a lean checkpoint is loaded by transformers first."""
        if self.model_config.hf_config.lean:
            whole = LLM2SLMForConditionalGeneration.from_pretrained(
                self.model_config.model, revision=self.model_config.revision, dtype=self.model_config.dtype
            )
            llm_weights = whole.encoder.llm.state_dict().items()
            weights = chain(weights, ((f"encoder.llm.{name}", weight) for name, weight in llm_weights))
        base = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.model_config.hf_config.encoder)].base_model_prefix
        llm = "llm." if self.has_head else f"llm.{base}."
        mapper = WeightsMapper(orig_to_new_prefix={"encoder.llm.": llm, "decoder.": "slm."})
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        if not self.has_head:  # its last norm and its head have no weights, and are not used
            loaded |= {name for name, _ in self.named_parameters() if name.startswith("llm.")}
        return loaded

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.slm.embed_input_ids(input_ids % self.size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return hidden states `(tokens, width + 1)`; the last number is 1 where they are the LLM's."""
        is_prompt = input_ids >= self.size
        if get_forward_context().attn_metadata is None:  # vLLM measures memory: no request is there
            self.llm_rows.index = None
            self.llm(input_ids % self.llm_size, positions)
            is_prompt = torch.zeros_like(is_prompt)
        hidden_states = None
        for part, rows, of_part in ((self.llm, self.llm_rows, is_prompt), (self.slm, self.slm_rows, ~is_prompt)):
            index = of_part.nonzero()[:, 0]
            if not len(index):
                continue
            rows.tokens, rows.index = len(input_ids), None if len(index) == len(input_ids) else index
            states = part(input_ids[index] % self.size, positions[index])
            if hidden_states is None:
                hidden_states = states.new_empty(len(input_ids), states.shape[1] + 1)
            hidden_states[index, :-1] = states
            hidden_states[index, -1] = float(part is self.llm)
        assert hidden_states is not None
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits `(tokens, 2 * V)`: ids of prompt tokens are never sampled."""
        states, is_llm, size = hidden_states[:, :-1], hidden_states[:, -1] > 0, 2 * self.size
        logits = None
        for part, of_part in ((self.llm, is_llm), (self.slm, ~is_llm)):
            index = of_part.nonzero()[:, 0]
            if not len(index):
                continue
            found = part.compute_logits(states[index])
            if len(index) == len(states):
                return pad(found, (0, size - found.shape[1]), value=-torch.inf)
            if logits is None:
                logits = found.new_full((len(states), size), -torch.inf)
            logits[index, : found.shape[1]] = found
        assert logits is not None
        return logits


def _part(vllm_config: Any, config: Any, prefix: str) -> Any:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    return init_vllm_registered_model(vllm_config, hf_config=config, prefix=prefix, architectures=[architecture])


def _read_rows(part: nn.Module, rows: Rows) -> list[Any]:
    """Let the attention of a part read rows; return its layers in their order."""
    layers = [module for module in part.modules() if isinstance(module, Attention)]
    for layer in layers:
        if layer.attn_backend.forward_includes_kv_cache_update:
            raise ValueError(
                f"vLLM's attention {layer.attn_backend.get_name()} writes keys and values of all tokens of a step, so "
                'it cannot run fusion "cache". Choose another one with `attention_backend`.'
            )
        layer.impl.rows = rows
        layer.impl.__class__ = reading_rows(layer.impl.__class__)
    return layers
