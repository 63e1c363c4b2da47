"""The calls of llama.cpp's C interface that engines share."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .exported import FIX


MOST_ROWS = 256  # outputs that one context holds
UBATCH = 512  # tokens that are computed at once
KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}  # llama.cpp's numbers of dtypes


_callbacks: list[Any] = []  # llama.cpp keeps no reference


@functools.cache
def api() -> Any:
    """Return llama.cpp's functions, after silencing its log."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.llama_backend_init()
    _callbacks.append(silence)
    return llama_cpp


class Model:
    """
    A loaded GGUF file.

    Args:
        file: The file.

    Raises:
        OSError: If llama.cpp cannot load it.
    """

    def __init__(self, file: Path):
        self.pointer = api().llama_model_load_from_file(str(file).encode(), api().llama_model_default_params())
        if not self.pointer:
            raise OSError(f"{file.name} is missing or damaged: llama.cpp cannot load it. {FIX}")
        self.vocab_size = api().llama_vocab_n_tokens(api().llama_model_get_vocab(self.pointer))
        learned = api().llama_model_rope_type(self.pointer) == api().LLAMA_ROPE_TYPE_NONE  # GPT-2's, which have an end
        self.positions = api().llama_model_n_ctx_train(self.pointer) if learned else None

    def __del__(self) -> None:
        if getattr(self, "pointer", None) and not sys.is_finalizing():
            api().llama_model_free(self.pointer)


class Context:
    """
    Memory for the keys and values of several outputs, and for what is computed.

    Args:
        model: The model.
        rows: Most outputs.
        places: Most tokens in all outputs.
        threads: CPU threads.
        kind: dtype of keys and values.
        at_once: Tokens that are computed at once. Default: 512.

    Raises:
        ValueError: If there are too many rows.
    """

    def __init__(self, model: Model, rows: int, places: int, threads: int, kind: np.dtype, at_once: int = UBATCH):
        if rows > MOST_ROWS:
            raise ValueError(
                f"llama.cpp holds at most {MOST_ROWS} outputs at once, and this batch has {rows}. Generate in smaller "
                "batches."
            )
        settings = api().llama_context_default_params()
        settings.n_ctx = settings.n_batch = places
        settings.n_ubatch, settings.n_seq_max, settings.n_outputs_max = min(at_once, places), rows, rows
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = KINDS[kind]
        settings.kv_unified, settings.no_perf = True, True
        settings.flash_attn_type = 0  # it is not exact in float32, and no faster here
        self.model, self.rows, self.places = model, rows, places  # the model must outlive the context
        self.pointer = api().llama_init_from_model(model.pointer, settings)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp has too little memory for {rows} outputs of {places} tokens in all.")
        self.memory = api().llama_get_memory(self.pointer)

    def __del__(self) -> None:
        if getattr(self, "pointer", None) and not sys.is_finalizing():
            api().llama_free(self.pointer)

    def run(self, function: Callable[..., int], wanted: np.ndarray, **batch: np.ndarray) -> np.ndarray:
        """
        Compute tokens.

        Args:
            function: `llama_decode` or `llama_encode`.
            wanted: The indices of the tokens whose logits are returned, in rising order.
            batch: For each token its `pos` and `sequence`, and its `token` or its embedding `embd` `(tokens, width)`.

        Returns:
            Logits `(wanted, vocabulary)`.
        """
        sequences = batch.pop("sequence").astype(np.int32)
        count = len(sequences)
        flags = np.zeros(count, dtype=np.int8)
        flags[wanted] = 1
        pointers = sequences.ctypes.data + sequences.itemsize * np.arange(count, dtype=np.uint64)
        own = api().llama_batch(n_tokens=count)
        fields = {**batch, "n_seq_id": np.ones(count, dtype=np.int32), "seq_id": pointers, "logits": flags}
        for name, kind in own._fields_:
            if name in fields:
                setattr(own, name, ctypes.cast(fields[name].ctypes.data, kind))
        if code := function(self.pointer, own):
            raise RuntimeError(f"llama.cpp failed with code {code}.")
        if not len(wanted):
            return np.empty((0, self.model.vocab_size), dtype=np.float32)
        logits = api().llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(logits, (len(wanted), self.model.vocab_size)).copy()


__all__ = ["KINDS", "Context", "Model", "api"]
