"""A T5 on llama.cpp, to compare LLM-to-SLM with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from ..inference.engine import BenchmarkModels, Contestant
from .gguf import write_gguf
from .llama_cpp_calls import Context, Model, api


GGUF = "model.gguf"


class LlamaCppT5:
    """
    A T5 of a GGUF file, which generates greedily with PyTorch's number of threads.

    Args:
        file: The GGUF file.
        kind: dtype of keys and values.
    """

    def __init__(self, file: Path, kind: Any = np.float16):
        self._model, self._kind = Model(file), np.dtype(kind)
        self._start = api().llama_model_decoder_start_token(self._model.pointer)
        self._context: Context | None = None

    def __call__(self, ids: torch.Tensor, new_tokens: int, num_beams: int) -> list[list[int]]:
        """
        Return outputs of exactly `new_tokens` tokens, for prompts `(batch, prompt)`.

        Raises:
            ValueError: If `num_beams` is not 1, since llama.cpp has no beam search.
        """
        if num_beams != 1:
            raise ValueError("llama.cpp has no beam search.")
        rows, length = ids.shape
        context = self._reserve(rows, rows * max(length, new_tokens + 1))  # an encoder reads all prompts at once
        each, places = np.arange(rows), np.tile(np.arange(length, dtype=np.int32), rows)
        tokens = ids.int().numpy()
        context.run(api().llama_encode, each[:0], token=tokens, pos=places, sequence=each.repeat(length))
        tokens, outputs = np.full(rows, self._start, dtype=np.int32), []
        for place in range(new_tokens):
            position = np.full(rows, place, dtype=np.int32)
            logits = context.run(api().llama_decode, each, token=tokens, pos=position, sequence=each)
            tokens = logits.argmax(-1).astype(np.int32)
            outputs.append(tokens)
        return np.stack(outputs, axis=1).tolist()

    def _reserve(self, rows: int, tokens: int) -> Context:
        """Return an empty context that is large enough."""
        if self._context is None or rows > self._context.rows or tokens > self._context.places:
            self._context = Context(self._model, rows, tokens, torch.get_num_threads(), self._kind, at_once=tokens)
        api().llama_memory_clear(self._context.memory, True)
        return self._context


def _make(models: BenchmarkModels, folder: Path) -> None:
    write_gguf(AutoModelForSeq2SeqLM.from_pretrained(models.llm, dtype=torch.float32), folder / GGUF, "Q8_0")


T5_CONTESTANT = Contestant(
    load=lambda models, folder, device: LlamaCppT5(folder / GGUF),
    make=_make,
    model="llm", bits=8, beams=False, packages=("llama-cpp-python", "gguf"),
)  # fmt: skip


__all__ = ["T5_CONTESTANT", "LlamaCppT5"]
