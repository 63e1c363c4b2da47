"""An LLM that writes the first token of an output, and a small model with the same tokenizer that writes the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_llm2slm.inference.text_to_text import TextToText


class FirstToken:
    """
    Both models read the prompt, and nothing else of the LLM is handed over. It generates as a `TextToText` does.

    Args:
        llm: Folder of the decoder-only LLM.
        slm: Folder of the small model.
        options: Arguments of `TextToText.from_pretrained`, for both.
    """

    def __init__(self, llm: Path, slm: Path, **options: Any):
        self.llm, self.slm = TextToText.from_pretrained(llm, **options), TextToText.from_pretrained(slm, **options)
        self.tokenizer = self.slm.tokenizer

    def generate(self, prompts: Sequence[str], batch_size: int = 32, **options: Any) -> list[str]:
        """Generate text for prompts."""
        return self.tokenizer.batch_decode(
            self.generate_tokens(prompts, batch_size, **options), skip_special_tokens=True
        )

    def generate_tokens(
        self, prompts: Sequence[str], batch_size: int = 32, *, max_new_tokens: int, **options: Any
    ) -> list[list[int]]:
        """Return the token ids of each output. Prompts of similar length share a batch."""
        outputs = self.llm.generate_tokens(prompts, batch_size, max_new_tokens=1, **options)
        prompt_ids = self.slm.features(list(prompts))["input_ids"]
        unfinished = [row for row, tokens in enumerate(outputs) if tokens[-1] != self.tokenizer.eos_token_id]
        unfinished.sort(key=lambda row: len(prompt_ids[row]))
        for start in range(0, len(unfinished), batch_size):
            rows = unfinished[start : start + batch_size]
            ids = [prompt_ids[row] + outputs[row] for row in rows]
            inputs = self.slm.read({"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]})
            written = self.slm.write(inputs, max_new_tokens=max_new_tokens - 1, **options)
            for row, tokens in zip(rows, written, strict=True):
                outputs[row] = outputs[row] + tokens
        return outputs
