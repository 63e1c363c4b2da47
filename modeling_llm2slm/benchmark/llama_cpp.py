"""The LLM on llama.cpp, to compare with: a T5 or Gemma 3 as a GGUF file, and greedy search in batches."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM


# What llama.cpp calls the families, and the names of their sizes in its files and in transformers' configs.
ARCHITECTURES = {"t5": "t5", "gemma3_text": "gemma3"}
SIZES: dict[str, dict[str, str]] = {
    "t5": {
        "embedding_length": "d_model", "feed_forward_length": "d_ff", "block_count": "num_layers",
        "decoder_block_count": "num_decoder_layers", "head_count": "num_heads", "key_length": "d_kv",
        "value_length": "d_kv", "layer_norm_rms_eps": "layer_norm_epsilon",
        "relative_attn_buckets_count": "relative_attention_num_buckets",
        "decoder_start_token_id": "decoder_start_token_id",
    },
    "gemma3_text": {
        "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
        "head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads", "key_length": "head_dim",
        "value_length": "head_dim", "layer_norm_rms_eps": "rms_norm_eps", "sliding_window": "sliding_window",
    },
}  # fmt: skip


def write_gguf(llm: str | Path, path: Path, weights: str) -> None:
    """
    Write an LLM in llama.cpp's format, without a tokenizer.

    llama.cpp's own converter needs the original tokenizer, which models with random weights or a pruned vocabulary do
    not have.

    Args:
        llm: Folder of the checkpoint.
        path: The file to write.
        weights: Format of the matrices, a name of `gguf.GGMLQuantizationType` such as "Q8_0".

    Raises:
        ValueError: If the checkpoint is neither a T5 nor a Gemma 3 for text.
    """
    import gguf

    config = AutoConfig.from_pretrained(llm)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"{llm} is a {config.model_type}; for llama.cpp, only T5 and Gemma 3 are converted. Name the "
            "`contestants` of each cell to leave it out."
        )
    is_gemma = config.model_type == "gemma3_text"
    model = (AutoModelForCausalLM if is_gemma else AutoModelForSeq2SeqLM).from_pretrained(llm, dtype=torch.float32)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    for name, own_name in SIZES[config.model_type].items():
        getattr(writer, f"add_{name}")(getattr(config, own_name))
    if is_gemma:
        bases = {name: rope["rope_theta"] for name, rope in config.rope_parameters.items()}
        writer.add_rope_freq_base(bases["full_attention"])
        writer.add_rope_freq_base_swa(bases["sliding_attention"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    else:
        writer.add_context_length(512)  # what T5 was trained on; its positions have no end
    layers = max(getattr(config, "num_decoder_layers", 0), config.num_hidden_layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    for name, tensor in model.named_parameters():  # each tied one once
        # The bias of positions must be float32, as norms are.
        is_matrix = tensor.dim() == 2 and "relative_attention_bias" not in name
        kind = gguf.GGMLQuantizationType[weights if is_matrix else "F32"]
        is_from_one = is_gemma and name.endswith("norm.weight")  # transformers adds one to what it stores
        data = gguf.quants.quantize((tensor.detach() + is_from_one).numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """
    An LLM on llama.cpp, on a CPU, with PyTorch's number of threads.

    Args:
        path: The GGUF file.

    Raises:
        ValueError: If llama.cpp cannot load the file.
    """

    def __init__(self, path: Path):
        import llama_cpp

        self._api = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps no reference
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}. Remove it, so that it is made again.")
        self._has_encoder = llama_cpp.llama_model_has_encoder(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._size = (0, 0)  # rows and tokens that fit into the context and the batch
        self._context: Any = None
        self._batch: Any = None

    def __call__(self, ids: torch.Tensor, new_tokens: int, num_beams: int) -> list[list[int]]:
        """
        Return outputs of exactly `new_tokens` tokens, for prompts `(batch, prompt)`.

        Raises:
            ValueError: If `num_beams` is not 1, since llama.cpp has no beam search.
        """
        if num_beams != 1:
            raise ValueError("llama.cpp has no beam search.")
        return self.generate(ids.tolist(), new_tokens)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, end: int | None = None) -> list[list[int]]:
        """
        Continue prompts greedily.

        Args:
            prompts: Tokens of each prompt of a batch.
            new_tokens: Most tokens of an output.
            end: Token that ends an output, and is its last one. Default: none.
        """
        self._reserve(len(prompts), sum(map(len, prompts)) + len(prompts) * (new_tokens + 1))
        whole = [(token, place, row) for row, prompt in enumerate(prompts) for place, token in enumerate(prompt)]
        step, lengths = whole, [len(prompt) for prompt in prompts]
        if self._has_encoder:
            self._run(self._api.llama_encode, whole, [])
            start = self._api.llama_model_decoder_start_token(self._model)
            step, lengths = [(start, 0, row) for row in range(len(prompts))], [1] * len(prompts)
        outputs: list[list[int]] = [[] for _ in prompts]
        open_rows = list(range(len(prompts)))
        while open_rows:
            last = {row: index for index, (_, _, row) in enumerate(step)}
            for row, token in zip(
                open_rows, self._run(self._api.llama_decode, step, list(last.values())), strict=True
            ):
                outputs[row].append(token)
            open_rows = [row for row in open_rows if len(outputs[row]) < new_tokens and outputs[row][-1] != end]
            step = [(outputs[row][-1], lengths[row] + len(outputs[row]) - 1, row) for row in open_rows]
        return outputs

    def _reserve(self, rows: int, tokens: int) -> None:
        """Empty the context, and make a larger one if this one is too small."""
        if rows > self._size[0] or tokens > self._size[1]:
            if self._context is not None:
                self._api.llama_batch_free(self._batch)
                self._api.llama_free(self._context)
                self._size = (0, 0)
            settings = self._api.llama_context_default_params()
            settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens  # an encoder reads all prompts at once
            settings.n_seq_max, settings.kv_unified = rows, True  # the bias of T5's positions needs one cache
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            self._context = self._api.llama_init_from_model(self._model, settings)
            if not self._context:
                raise RuntimeError(f"llama.cpp has too little memory for {rows} prompts of {tokens} tokens in all.")
            self._batch = self._api.llama_batch_init(tokens, 0, 1)
            self._size = rows, tokens
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _run(self, function: Any, step: list[tuple[int, int, int]], read: list[int]) -> list[int]:
        """Compute tokens, each with its position and row, and return the likeliest ones after those at `read`."""
        batch = self._batch
        batch.n_tokens = len(step)
        for index, (token, position, row) in enumerate(step):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = row, False
        for index in read:
            batch.logits[index] = True
        if code := function(self._context, batch):
            raise RuntimeError(f"llama.cpp failed with code {code}.")
        tokens = []
        for index in read:
            row = self._api.llama_get_logits_ith(self._context, index)
            logits = ctypes.cast(row, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
            tokens.append(int(torch.frombuffer(logits, dtype=torch.float32).argmax()))
        return tokens
