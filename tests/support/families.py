"""Tiny models, with random weights, of every family of SLM and LLM that is supported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    BartConfig,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MT5Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    UMT5Config,
)


LLM_VOCAB_SIZE = 120
SLM_VOCAB_SIZE = 99
PAD = 0  # the LLM's
END = SLM_VOCAB_SIZE - 1  # the SLM's: as for GPT-2, one id starts, ends and pads

GPT: dict[str, Any] = {"vocab_size": SLM_VOCAB_SIZE, "bos_token_id": END, "eos_token_id": END}
ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**ROTARY, "num_key_value_heads": 2, "head_dim": 8}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "dropout_rate": 0.0}
T5_IDS = {"vocab_size": SLM_VOCAB_SIZE, "pad_token_id": END, "eos_token_id": END, "decoder_start_token_id": END}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
}


class SLM(NamedTuple):
    """A family of SLM: its name for readers, a real model of it, a tiny config."""

    name: str
    example: str
    config: Callable[[], PreTrainedConfig]


class LLM(NamedTuple):
    """A family of LLM: its name for readers, a real model of it, a tiny config of a whole model."""

    name: str
    example: str
    config: Callable[..., PreTrainedConfig]
    layer: int | None = None  # the layer to take the states from


def partial(config_class: Any, *values: dict[str, Any], **more: Any) -> Callable[..., Any]:
    merged: dict[str, Any] = {}
    for value in values:
        merged |= value
    return functools.partial(config_class, **(merged | more))


SLMS = {
    "gpt2": SLM(
        "GPT-2", "openai-community/gpt2", partial(GPT2Config, GPT, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "gpt_neo": SLM(
        "GPT-Neo",
        "EleutherAI/gpt-neo-125m",
        partial(
            GPTNeoConfig,
            GPT,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        ),
    ),
    "gpt_neox": SLM("GPT-NeoX", "EleutherAI/pythia-160m", partial(GPTNeoXConfig, GPT, ROTARY)),
    "opt": SLM(
        "OPT",
        "facebook/opt-125m",
        partial(
            OPTConfig,
            GPT,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            pad_token_id=1,
        ),
    ),
    "opt_projected": SLM(
        "OPT with projected embeddings",
        "facebook/opt-350m",
        partial(
            OPTConfig,
            GPT,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            pad_token_id=1,
            do_layer_norm_before=False,
        ),
    ),
    "llama": SLM("Llama, untied head", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", partial(LlamaConfig, GPT, GROUPED)),
    "smollm": SLM(
        "Llama, tied head",
        "HuggingFaceTB/SmolLM2-135M",
        partial(LlamaConfig, GPT, GROUPED, tie_word_embeddings=True),
    ),
    "qwen3": SLM(
        "Qwen3", "Qwen/Qwen3-0.6B", partial(Qwen3Config, GPT, GROUPED, head_dim=16, tie_word_embeddings=True)
    ),
    "gemma3": SLM(
        "Gemma 3",
        "google/gemma-3-270m",
        partial(
            Gemma3TextConfig,
            GPT,
            GROUPED,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
    ),
    "t5": SLM("T5", "google-t5/t5-small", partial(T5Config, T5, T5_IDS, num_layers=1, num_decoder_layers=3)),
    "flan_t5": SLM(
        "FLAN-T5",
        "google/flan-t5-small",
        partial(
            T5Config,
            T5,
            T5_IDS,
            num_layers=2,
            num_decoder_layers=1,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
    ),
    "mt5": SLM("mT5", "google/mt5-small", partial(MT5Config, T5, T5_IDS, num_layers=2, num_decoder_layers=2)),
    "bart": SLM(
        "BART",
        "facebook/bart-base",
        partial(
            BartConfig,
            BART,
            GPT,
            encoder_layers=1,
            decoder_layers=2,
            pad_token_id=1,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
        ),
    ),
}

# Families for fusion "cache": an LLM of three layers, of which an SLM of two is made.
SHARING = ("gemma3", "llama", "qwen3", "gpt2", "opt", "gpt_neox")
SHARED_LAYERS = [0, 2]

# transformers generates other outputs for these with a static cache.
NO_STATIC_CACHE = ("gpt_neo",)

T5_SIZES: dict[str, Any] = {**T5, "num_layers": 3, "num_decoder_layers": 1, "pad_token_id": PAD}
CAUSAL = {**GROUPED, "num_hidden_layers": 3, "pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": 2}
BERT = {**ROTARY, "num_hidden_layers": 3, "pad_token_id": PAD, "max_position_embeddings": 80}


def t5gemma_config(vocab_size: int = LLM_VOCAB_SIZE, **kwargs: Any) -> T5GemmaConfig:
    module = T5GemmaModuleConfig(
        **{**CAUSAL, "sliding_window": 8, "query_pre_attn_scalar": 8, "vocab_size": vocab_size, **kwargs}
    )
    return T5GemmaConfig(encoder=module.to_dict(), decoder=module.to_dict(), vocab_size=vocab_size)


LLMS = {
    "t5": LLM("T5", "google-t5/t5-large", partial(T5Config, T5_SIZES, eos_token_id=1, decoder_start_token_id=PAD)),
    "flan_t5": LLM(
        "FLAN-T5",
        "google/flan-t5-xl",
        partial(T5Config, T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "mt5": LLM(
        "mT5", "google/mt5-large", partial(MT5Config, T5, num_layers=3, num_decoder_layers=1, pad_token_id=PAD)
    ),
    "umt5": LLM(
        "UMT5", "google/umt5-base", partial(UMT5Config, T5, num_layers=3, num_decoder_layers=1, pad_token_id=PAD)
    ),
    "t5gemma": LLM("T5Gemma", "google/t5gemma-2b-2b-ul2", t5gemma_config),
    "bart": LLM(
        "BART", "facebook/bart-large", partial(BartConfig, BART, encoder_layers=3, decoder_layers=1, pad_token_id=PAD)
    ),
    "bert": LLM("BERT", "google-bert/bert-large-uncased", partial(BertConfig, BERT)),
    "roberta": LLM("RoBERTa", "FacebookAI/roberta-large", partial(RobertaConfig, BERT)),
    "llama": LLM("Llama, a middle layer", "meta-llama/Llama-3.2-3B", partial(LlamaConfig, CAUSAL), layer=2),
    "qwen3": LLM("Qwen3, a middle layer", "Qwen/Qwen3-4B", partial(Qwen3Config, CAUSAL), layer=1),
    "gpt2": LLM(
        "GPT-2, a middle layer",
        "openai-community/gpt2-xl",
        partial(GPT2Config, n_embd=32, n_layer=3, n_head=4, n_positions=80, pad_token_id=PAD, eos_token_id=1),
        layer=2,
    ),
}


def build_slm(family: str) -> PreTrainedModel:
    """A tiny SLM with random weights."""
    torch.manual_seed(0)
    config = SLMS[family].config()
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return move_vectors(auto_class.from_config(config).eval())


def build_llm(family: str, vocab_size: int = LLM_VOCAB_SIZE) -> PreTrainedModel:
    """The whole of a tiny LLM with random weights, as its class for reading alone has it."""
    torch.manual_seed(1)
    config = LLMS[family].config(vocab_size=vocab_size)
    text_encoding = family in ("t5", "flan_t5", "mt5", "umt5", "t5gemma", "bert", "roberta")
    if family == "t5gemma":
        config.is_encoder_decoder = False  # its class for reading alone asks for it
    return move_vectors((AutoModelForTextEncoding if text_encoding else AutoModel).from_config(config).eval())


def build_whole(family: str, **values: Any) -> PreTrainedModel:
    """A tiny decoder-only LLM with its head, of the family of an SLM and with one layer more."""
    torch.manual_seed(1)
    layers = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    kinds = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]} if family == "gemma3" else {}
    config = SLMS[family].config(**{layers: 3, **kinds, "pad_token_id": PAD, "initializer_range": 0.3, **values})
    return move_vectors(AutoModelForCausalLM.from_config(config).eval())


def move_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """Norms and biases start at one and zero, and a forgotten one would not be seen: give each values of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tables() -> str:
    """The families as `docs/reference/models.md` lists them."""
    lines = ["| SLM | for example | reads the prompt with | static cache |", "| --- | --- | --- | --- |"]
    for key, slm in SLMS.items():
        reads = "its own encoder" if slm.config().is_encoder_decoder else "the positions before the output"
        lines.append(f"| {slm.name} | `{slm.example}` | {reads} | {'refused' if key in NO_STATIC_CACHE else 'yes'} |")
    lines += ["", "| LLM | for example | hidden states come from |", "| --- | --- | --- |"]
    for llm in LLMS.values():
        taken = "any layer (`encoder_layer`); upper layers are never loaded" if llm.layer else "its encoder"
        lines.append(f"| {llm.name.split(',')[0]} | `{llm.example}` | {taken} |")
    return "\n".join(lines)
