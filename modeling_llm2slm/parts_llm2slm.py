# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""The two parts of an LLM-to-SLM model: which models can be LLM and SLM, and where the LLM is cut."""

import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils import logging

from .configuration_llm2slm import LLM2SLMConfig, llm_sizes
from .fusion_llm2slm import fusion_of


logger = logging.get_logger(__name__)


def llm_class(config: PreTrainedConfig, has_head: bool = False) -> Any:
    if has_head:
        return AutoModelForCausalLM
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def slm_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_llm(config: LLM2SLMConfig) -> PreTrainedModel:
    """Build the LLM of a configuration with new weights, in its own dtype."""
    dtype = getattr(torch, config.encoder_dtype) if config.encoder_dtype else torch.get_default_dtype()
    fusion = fusion_of(config)
    llm = reader_of(llm_class(config.encoder, fusion.llm_has_head).from_config(config.encoder, dtype=dtype))
    if dtype == torch.float16:  # `from_pretrained` does this too, but only for the dtype of the whole model
        for name, module in llm.named_modules():
            if name.rsplit(".", 1)[-1] in (llm._keep_in_fp32_modules or ()):
                module.to(torch.float32)
    return keep_layers(llm, fusion.llm_layer)


def reader_of(llm: PreTrainedModel) -> PreTrainedModel:
    """Return the module of an LLM that reads a prompt: the encoder of BART, BERT without its pooler."""
    if isinstance(llm.config, LLM2SLMConfig):
        raise ValueError("A llm2slm model cannot be the LLM: it consists of an LLM and an SLM. Take its LLM.")
    if llm.config.is_encoder_decoder and llm_class(llm.config) is AutoModel:
        llm = llm.get_encoder()
    if getattr(llm, "pooler", None) is not None:
        llm.pooler = None
    # An encoder also names its decoder's layers, and FSDP refuses names of modules that do not exist.
    here = {type(module).__name__ for module in llm.modules()}
    llm._no_split_modules = [name for name in llm._no_split_modules or () if name in here]
    return llm


def check_token_ids(name: str, token_ids: torch.Tensor, part: str, vocab_size: int) -> None:
    """Raise `ValueError` for a token id that the vocabulary of a part lacks; `labels` may hold -100."""
    if torch.compiler.is_compiling() or type(token_ids) is not torch.Tensor:
        return  # the tokens of a graph, and fake ones, have no values
    wrong = ((token_ids < 0) | (token_ids >= vocab_size)) & ((token_ids != -100) | (name != "labels"))
    if wrong.any():
        raise ValueError(
            f"`{name}` holds the id {int(token_ids[wrong][0])}, but the {part}'s vocabulary has ids from 0 to "
            f"{vocab_size - 1}. Encode the text with the tokenizer of the {part}."
        )


def keep_layers(llm: PreTrainedModel, encoder_layer: int | None) -> PreTrainedModel:
    """
    Cut the LLM so that its `last_hidden_state` is `hidden_states[encoder_layer]` of the full one. A checkpoint may
    still hold the layers that were cut off; loading ignores them.
    """
    layers_in_full = llm_sizes(llm.config).num_hidden_layers
    if encoder_layer is None or encoder_layer == layers_in_full:
        return llm
    for name, layers in llm.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == layers_in_full:
            del layers[encoder_layer:]
            stack = llm.get_submodule(name.rpartition(".")[0])
            cut = [f"{name}.{index}" for index in range(encoder_layer, layers_in_full)]
            for child_name, child in stack.named_children():
                if "Norm" in type(child).__name__ and "emb" not in child_name:
                    setattr(stack, child_name, nn.Identity())  # the full model applies it after its last layer only
                    cut.append(".".join([*name.split(".")[:-1], child_name]))
            llm._keys_to_ignore_on_load_unexpected = {rf"{re.escape(module)}\." for module in cut}
            return llm
    raise ValueError(
        f"`encoder_layer` is not supported for a {llm.config.model_type} LLM: its {layers_in_full} layers are not in "
        "one list. Leave it out."
    )


def keep_special_ids(model: Any, before: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """
    Undo what `Trainer` does first: it writes the special ids of a processor's `tokenizer`, which is the LLM's, into
    one config and the generation config of the SLM. A user who changes an id writes it into both configs. Takes the
    last result of this function, and returns the current ids by name in the three configs.
    """
    holders = (model.config, model.config.decoder, model.generation_config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    held = {name: [getattr(holder, name, None) for holder in holders] for name in names}
    for name, old in before.items():
        new = [_first_id(now) if now != was else None for now, was in zip(held[name], old, strict=True)]
        if (new[0] is None) != (new[1] is None) and _first_id(held[name][2]) in new[:2]:
            logger.warning_once("`Trainer` wrote special ids of `processing_class` into a config; this is undone.")
            for holder, value in zip(holders, old, strict=True):
                setattr(holder, name, value)
            held[name] = old
    return held


def _first_id(token_ids: int | list[int] | None) -> int | None:
    return token_ids[0] if isinstance(token_ids, list) and token_ids else token_ids  # type: ignore[return-value]
