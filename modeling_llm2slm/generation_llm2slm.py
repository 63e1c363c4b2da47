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
"""What stock `generate()` may ask of an LLM-to-SLM model, and when it may stop."""

from typing import Any

import torch
from transformers.generation import GenerationConfig, StoppingCriteriaList

from .configuration_llm2slm import LLM2SLMConfig


def check_generation(config: LLM2SLMConfig, generation_config: GenerationConfig) -> None:
    """Raise `ValueError` on what stock generation would do wrongly where two models read and write."""
    reasons = {
        "guidance_scale": (1, "runs the answer's side alone as if it had no prompt"),
        "prefill_chunk_size": (None, "cuts a prompt of token ids, and this one is embedded as a whole"),
    }
    # CODEPATH: two tokenizers. Stock gives these two processors the prompt's ids, which are the LLM's.
    if not config.shared_tokenizer:
        two = "compares prompt and answer, which have different vocabularies here"
        reasons |= {"encoder_repetition_penalty": (1, two), "encoder_no_repeat_ngram_size": (0, two)}
    for name, (off, reason) in reasons.items():
        if getattr(generation_config, name, None) not in (None, off):
            raise ValueError(f"`{name}` is not supported: it {reason}. Leave it out.")


class StopAfterStart(StoppingCriteriaList):
    """
    Criteria that never stop at the start token alone. Up to transformers 5.17 prompt lookup asks them about it, and of
    a GPT-2 it is the end token as well.
    """

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        return done if input_ids.shape[1] > 1 else torch.zeros_like(done)
