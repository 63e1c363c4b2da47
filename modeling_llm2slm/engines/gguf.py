"""Models as GGUF files, the format of llama.cpp, without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


BLOCK = 32  # weights that share a scale in Q8_0
SLIDING = "sliding_attention"
# What llama.cpp calls the families, and the names of their sizes in its files and in transformers' configs.
ARCHITECTURES = {"gemma3_text": "gemma3", "gpt2": "gpt2", "llama": "llama", "qwen3": "qwen3", "t5": "t5"}
DECODER = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads", "key_length": "head_dim",
    "value_length": "head_dim", "rope_dimension_count": "head_dim", "layer_norm_rms_eps": "rms_norm_eps",
}  # fmt: skip
SIZES: dict[str, dict[str, str]] = {
    "gemma3_text": {**DECODER, "sliding_window": "sliding_window"},
    "gpt2": {
        "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
        "head_count": "n_head", "layer_norm_eps": "layer_norm_epsilon",
    },
    "llama": DECODER,
    "qwen3": DECODER,
    "t5": {
        "embedding_length": "d_model", "feed_forward_length": "d_ff", "block_count": "num_layers",
        "decoder_block_count": "num_decoder_layers", "head_count": "num_heads", "key_length": "d_kv",
        "value_length": "d_kv", "layer_norm_rms_eps": "layer_norm_epsilon",
        "relative_attn_buckets_count": "relative_attention_num_buckets",
        "decoder_start_token_id": "decoder_start_token_id",
    },
}  # fmt: skip


def check_family(model: Any) -> None:
    """Raise `ValueError` if llama.cpp cannot compute a model, or if its layers or rotary embedding are not written."""
    family = model.config.model_type
    if SLIDING in (getattr(model.config, "layer_types", None) or ()) and family != "gemma3_text":
        raise ValueError(
            f"llama.cpp computes no sliding-window layers of {family}. Use another engine, such as openvino."
        )
    ropes = getattr(model.config, "rope_parameters", None) or {}
    kinds = {rope["rope_type"] for rope in (ropes.values() if "rope_type" not in ropes else [ropes])}
    if unknown := kinds - {"default", *(["llama3"] if family == "llama" else [])}:
        raise ValueError(
            f"The rotary embedding of this {family} is {unknown.pop()}, which is not written for llama.cpp. Use "
            "another engine, such as openvino."
        )
    if family not in ARCHITECTURES:
        *others, last = sorted(ARCHITECTURES)
        raise ValueError(
            f"llama.cpp computes models of the types {', '.join(others)} and {last} here, and not "
            f"{family}. Use another engine, such as openvino."
        )


def write_gguf(model: Any, path: Path, weights: str) -> None:
    """
    Write a model as a GGUF file. llama.cpp's own converter needs the original tokenizer, which models with random
    weights or a pruned vocabulary do not have.

    Args:
        model: A T5, or a decoder-only model, in float32.
        path: The file.
        weights: Format of the matrices, a name of `gguf.GGMLQuantizationType`: "F32" or "Q8_0".

    Raises:
        ValueError: See [`check_family`].
    """
    import gguf

    check_family(model)
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(model.get_input_embeddings().num_embeddings)
    for name, own_name in SIZES[family].items():
        getattr(writer, f"add_{name}")(getattr(config, own_name))
    if family == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    elif family == "t5":
        writer.add_context_length(512)  # what T5 was trained on; its positions have no end
    elif family == "gemma3_text":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(config.rope_parameters[SLIDING]["rope_theta"])
        writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    layers = max(getattr(config, "num_decoder_layers", 0), config.num_hidden_layers)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[family].upper()), layers)
    for name, tensor in _tensors(model):
        # Positions and their bias must be float32, as norms are.
        is_matrix = tensor.dim() == 2 and "wpe" not in name and "relative_attention_bias" not in name
        kind = gguf.GGMLQuantizationType["F32" if not is_matrix or tensor.shape[1] % BLOCK else weights]
        data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(tensor: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """
    Put the two halves of each head, which rotary embeddings turn together, in turns along an axis (counted from the
    end): llama.cpp turns neighbours in a Llama, and halves in other families.
    """
    return tensor.unflatten(axis, (2, -1)).transpose(axis - 1, axis).flatten(axis - 1, axis)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a model as llama.cpp stores them, each tied one once."""
    config, family = model.config, model.config.model_type
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name in transposed:
            tensor = tensor.T
        elif family == "gemma3_text" and name.endswith("norm.weight"):
            tensor = tensor + 1  # transformers adds it when it computes
        elif family == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleave(tensor.unflatten(0, (-1, config.head_dim)), axis=-tensor.dim()).flatten(0, 1)
        yield name, tensor
    if family == "llama" and config.rope_parameters["rope_type"] == "llama3":
        base = config.rope_parameters["rope_theta"]
        plain = base ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        yield "rope_freqs.weight", plain / model.base_model.rotary_emb.inv_freq


__all__ = ["check_family", "interleave", "write_gguf"]
