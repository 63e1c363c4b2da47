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
"""Prompts on their way through an LLM-to-SLM model: their states, and the place of their padding."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class PromptStates(ModelOutput):
    """
    A prompt as the SLM reads it: what `encode_prompt` returns and `encoder_outputs=` takes, as often as wanted.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, N, d_slm)`):
            For a decoder-only SLM the prompt embeddings P, any padding moved before the prompt; for an
            encoder-decoder SLM the output of the SLM's own encoder.
        attention_mask (`torch.LongTensor` of shape `(B, N)`):
            1 where `last_hidden_state` holds a prompt token, 0 on padding. Within `generate()` it has a row for each
            beam or sample, next to each other where they are of one prompt.
        hidden_states (`tuple(torch.Tensor)`, *optional*): The LLM's, if asked for, in the layout of its input.
        attentions (`tuple(torch.Tensor)`, *optional*): The LLM's, if asked for, in the layout of its input.
    """

    # `generate()` expands tensors in the output of `get_encoder()` for beams, so the mask travels with the states.
    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]
    attention_mask: torch.Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def copies(self) -> int:
        """How many beams or samples there are of each prompt."""
        return self.attention_mask.shape[0] // self.last_hidden_state.shape[0]

    def one_of_each(self) -> "PromptStates":
        """Each prompt once, whatever the number of its beams."""
        return replace(self, attention_mask=self.attention_mask[:: self.copies])

    def one_for_each(self) -> "PromptStates":
        """The states of a prompt again for each of its beams."""
        return replace(self, last_hidden_state=self.last_hidden_state.repeat_interleave(self.copies, dim=0))


def repeat_outputs(outputs: ModelOutput, copies: int) -> ModelOutput:
    """An output of the SLM, its cache included, with each row as often as there are beams of it."""

    def repeat(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(repeat, value))
        return value.repeat_interleave(copies, dim=0) if isinstance(value, torch.Tensor) else value

    outputs.past_key_values.batch_repeat_interleave(copies)
    return type(outputs)(**{name: repeat(value) for name, value in outputs.items()})


def as_prompt_states(
    encoder_outputs: PromptStates | ModelOutput | tuple, attention_mask: torch.Tensor | None, check: bool = False
) -> PromptStates:
    """States as `encode_prompt` returns them, or a bare `last_hidden_state` that `attention_mask` describes."""
    states, own_mask = encoder_outputs[0], getattr(encoder_outputs, "attention_mask", None)
    if own_mask is None:
        own_mask = (
            attention_mask if attention_mask is not None else states.new_ones(states.shape[:2], dtype=torch.long)
        )
    elif check and attention_mask is not None:
        given = (attention_mask != 0).sum(-1).to(own_mask.device)
        if attention_mask.shape != own_mask.shape or not torch.equal(given, own_mask.sum(-1)):
            raise ValueError(
                "`attention_mask` and `encoder_outputs` belong to different prompts: their numbers of tokens differ. "
                "Pass the mask that went into `encode_prompt`, or none."
            )
    return PromptStates(
        last_hidden_state=states,
        attention_mask=own_mask,
        hidden_states=getattr(encoder_outputs, "hidden_states", None),
        attentions=getattr(encoder_outputs, "attentions", None),
    )


def padding_to(side: str, mask: torch.Tensor) -> torch.Tensor:
    """The order `(B, N)` that moves the padding of a mask to the `"left"` or `"right"`; tokens keep theirs."""
    return mask.argsort(dim=-1, descending=side == "right", stable=True)


def reorder(values: torch.Tensor, order: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Values whose dimension `dim` is the prompt's `N`, each row in its order `(B, N)`."""
    shape = [1] * values.dim()
    shape[0], shape[dim] = order.shape
    return values.gather(dim, order.to(values.device).view(shape).expand_as(values))


__all__ = ["PromptStates"]
