"""A decoder-only model on llama.cpp that generates text as a `TextToText` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from modeling_llm2slm.benchmark.llama_cpp import LlamaCpp


class LlamaCppText:
    """
    Generates greedily, whatever the model's generation config says.

    Args:
        model: Folder of the checkpoint, for its tokenizer.
        path: Its GGUF file.
    """

    def __init__(self, model: Path, path: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = LlamaCpp(path)

    def generate(self, prompts: Sequence[str], batch_size: int = 32, **options: Any) -> list[str]:
        """Generate text for prompts."""
        tokens = self.generate_tokens(prompts, batch_size, **options)
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def generate_tokens(
        self, prompts: Sequence[str], batch_size: int = 32, *, max_new_tokens: int, do_sample: bool
    ) -> list[list[int]]:
        """Return the token ids of each output. Prompts of similar length share a batch."""
        assert not do_sample
        ids = self.tokenizer(list(prompts)).input_ids
        outputs: list[list[int]] = [[] for _ in ids]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            written = self.model.generate([ids[row] for row in rows], max_new_tokens, self.tokenizer.eos_token_id)
            for row, tokens in zip(rows, written, strict=True):
                outputs[row] = tokens
        return outputs
