"""The LLM on llama.cpp, to compare with: a T5 as a GGUF file, and greedy search with llama.cpp's own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM


CONTEXT = 512  # tokens that a T5 was trained on; llama.cpp only warns beyond


def write_gguf(llm: str, path: Path, weights: str) -> None:
    """
    Write a T5 in llama.cpp's format, without a tokenizer.

    llama.cpp's own converter needs the T5's SentencePiece tokenizer, which models with random weights do not have.

    Args:
        llm: Folder of the checkpoint.
        path: The file to write.
        weights: Format of the matrices, a name of `gguf.GGMLQuantizationType` such as "Q8_0".

    Raises:
        ValueError: If the checkpoint is not a T5.
    """
    import gguf

    model = AutoModelForSeq2SeqLM.from_pretrained(llm, dtype=torch.float32)
    config = model.config
    if config.model_type != "t5":
        raise ValueError(f"{llm} is a {config.model_type}; for llama.cpp, only T5 is converted.")
    writer = gguf.GGUFWriter(path, "t5")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_decoder_block_count(config.num_decoder_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_decoder_start_token_id(config.decoder_start_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, max(config.num_layers, config.num_decoder_layers))
    for name, tensor in model.named_parameters():  # each tied one once
        # The bias of positions must be float32, as norms are.
        is_matrix = tensor.dim() == 2 and "relative_attention_bias" not in name
        kind = gguf.GGMLQuantizationType[weights if is_matrix else "F32"]
        data = gguf.quants.quantize(tensor.detach().numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """
    A T5 on llama.cpp, on a CPU, with PyTorch's number of threads.

    Args:
        path: The GGUF file.
    """

    def __init__(self, path: Path):
        import llama_cpp

        self._api = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps no reference
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self._start = llama_cpp.llama_model_decoder_start_token(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def __call__(self, ids: torch.Tensor, new_tokens: int, num_beams: int) -> list[list[int]]:
        """
        Return the tokens after the start token, greedily and without an end.

        Args:
            ids: Prompts `(batch, prompt)` of equal length.
            new_tokens: Tokens of an output.
            num_beams: 1, since llama.cpp has no beam search.
        """
        if num_beams != 1:
            raise ValueError("llama.cpp has no beam search.")
        api, (batch_size, prompt) = self._api, ids.shape
        settings = api.llama_context_default_params()
        settings.n_ctx = batch_size * max(prompt, new_tokens + 1)
        settings.n_batch = settings.n_ubatch = batch_size * prompt  # an encoder reads all at once
        settings.n_seq_max, settings.kv_unified = batch_size, True  # T5 needs one cache for all rows
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        context = api.llama_init_from_model(self._model, settings)
        batch = api.llama_batch_init(batch_size * prompt, 0, 1)
        try:
            self._fill(batch, ids, 0)
            _check(api.llama_encode(context, batch))
            tokens = torch.full((batch_size, 1), self._start)
            outputs = []
            for position in range(new_tokens):
                self._fill(batch, tokens, position)
                _check(api.llama_decode(context, batch))
                rows = (api.llama_get_logits_ith(context, row) for row in range(batch_size))
                logits = [torch.frombuffer(self._floats(row), dtype=torch.float32) for row in rows]
                tokens = torch.stack(logits).argmax(-1, keepdim=True)
                outputs.append(tokens)
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)
        return torch.cat(outputs, 1).tolist()

    def _fill(self, batch: Any, tokens: torch.Tensor, first: int) -> None:
        """Put `tokens` `(batch, length)`, whose first has this position, into a batch of llama.cpp."""
        length = tokens.shape[1]
        batch.n_tokens = tokens.numel()
        for index, token in enumerate(tokens.flatten().tolist()):
            batch.token[index], batch.pos[index] = token, first + index % length
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, index // length
            batch.logits[index] = True

    def _floats(self, pointer: Any) -> Any:
        import ctypes

        return ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"llama.cpp failed with code {code}.")
