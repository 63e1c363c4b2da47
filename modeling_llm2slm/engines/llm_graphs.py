"""An encoder-decoder LLM as graphs, for a benchmark that gives the LLM every engine LLM-to-SLM has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..configuration_llm2slm import LLM2SLMConfig
from .graphs import CrossGraph, CrossStepGraph


class LLMEncoderGraph(nn.Module):
    """Turns prompts `(B, N)` into the output `(B, N, d_llm)` of the LLM's encoder."""

    def __init__(self, llm: Any):
        super().__init__()
        self.encoder = llm.get_encoder()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return {"last_hidden_state": outputs.last_hidden_state}

    def sample(self) -> dict[str, Any]:
        return {"input_ids": torch.full((2, 7), 2), "attention_mask": torch.ones(2, 7).long()}


class ExportableLLM(nn.Module):
    """
    An LLM in the shape of an LLM-to-SLM model whose SLM is the LLM itself: what an export reads of a model. The
    export generates like [`ExportedLLM2SLM`].
    """

    def __init__(self, llm: Any):
        super().__init__()
        self.decoder = llm
        self.config = LLM2SLMConfig(encoder=llm.config, decoder=llm.config, fusion="replace")
        self.generation_config = llm.generation_config

    def graphs(self) -> dict[str, Any]:
        """Return the modules that become graphs."""
        view: Any = SimpleNamespace(
            decoder=self.decoder, config=SimpleNamespace(prompt_size=self.config.decoder.d_model)
        )
        return {
            "prompt": LLMEncoderGraph(self.decoder),
            "cross": CrossGraph(view),
            "step": CrossStepGraph(view),
        }


__all__ = ["ExportableLLM"]
