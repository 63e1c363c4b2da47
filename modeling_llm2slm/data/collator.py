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
"""Batches for training an LLM-to-SLM model."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..cache_llm2slm import labels_mask
from ..fusion_llm2slm import fusion_of
from ..processing_llm2slm import LLM2SLMProcessor, LLM2SLMTokenizer


@dataclass
class DataCollatorForLLM2SLM:
    """
    Pads features of [`LLM2SLMProcessor`] to a batch: prompts with the LLM's tokenizer, labels with -100.

    Args:
        processor ([`LLM2SLMProcessor`] or [`LLM2SLMTokenizer`]): What made the features.
        model ([`LLM2SLMForConditionalGeneration`], *optional*):
            If given, `decoder_input_ids` are made from the labels, which `Trainer` needs for label smoothing.
        pad_to_multiple_of (`int`, *optional*): Pad lengths to a multiple of this.
        states ([`StateStore`], *optional*):
            A store of `llm2slm encode`. It gives the LLM's hidden states of each prompt, and the LLM does not run.

    Calling it returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` `(B, N)`; `labels` (and `decoder_input_ids`)
        `(B, M)` if the features have labels; `decoder_attention_mask` `(B, M)` if `model` has fewer than N + M
        positions; `llm_hidden_states` `(B, N, d_llm)` if there is a store.
    """

    processor: LLM2SLMProcessor | LLM2SLMTokenizer
    model: Any = None
    pad_to_multiple_of: int | None = None
    states: Any = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pad: dict[str, Any] = {"padding": True, "pad_to_multiple_of": self.pad_to_multiple_of, "return_tensors": "pt"}
        names = ("input_ids", "attention_mask", "labels")
        rows = [{name: row[name] for name in names if row.get(name) is not None} for row in features]
        batch = dict(self.processor.pad(rows, verbose=False, **pad))
        if self.states is not None:
            batch["llm_hidden_states"] = self.states.batch(batch["input_ids"], batch["attention_mask"])
        if "labels" in batch and self.model is not None:
            batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])
            # `Trainer` removes labels that it smooths. Without them only this mask tells which tokens are padding.
            if self.model.config.needs_output_mask(batch["input_ids"].shape[1], batch["labels"].shape[1]):
                batch["decoder_attention_mask"] = labels_mask(batch["labels"])
            # `Trainer` divides the loss by the number of labels that are trained.
            positions = torch.arange(batch["labels"].shape[1])
            batch["labels"] = fusion_of(self.model.config).trained_labels(batch["labels"], positions)
        return batch


@dataclass
class DataCollatorForTargets:
    """
    Pads batches for a decoder-only model so that it computes logits for targets only, which saves most of the work on
    short texts.

    The left side is padded, so that all targets of a batch end together, and `logits_to_keep` counts back from there.

    Args:
        tokenizer: The tokenizer that pads.

    Calling it returns:
        `input_ids`, `attention_mask` and `position_ids` `(B, N)`, `labels` `(B, K)`, and K as `logits_to_keep`: one
        more than the length of the longest target, since the separator predicts its first token.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in features]
        batch = dict(self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt", verbose=False))
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        targets = [[label for label in row["labels"] if label != -100] for row in features]
        kept = 1 + max(map(len, targets))
        batch["labels"] = torch.tensor([[-100] * (kept - len(target)) + target for target in targets])
        return {**batch, "logits_to_keep": kept}


__all__ = ["DataCollatorForLLM2SLM", "DataCollatorForTargets"]
