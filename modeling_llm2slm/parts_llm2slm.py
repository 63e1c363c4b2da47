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
"""The two parts of an LLM-to-SLM model: their classes in transformers, how they load, where the LLM is cut."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils import logging

from .configuration_llm2slm import LLM2SLMConfig


logger = logging.get_logger(__name__)


def llm_class(config: PreTrainedConfig) -> Any:
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def slm_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_llm(config: LLM2SLMConfig) -> PreTrainedModel:
    """The LLM of a configuration with new weights, in its own dtype."""
    dtype = getattr(torch, config.encoder_dtype) if config.encoder_dtype else torch.get_default_dtype()
    llm = llm_class(config.encoder).from_config(config.encoder, dtype=dtype)
    if dtype == torch.float16:  # `from_pretrained` does this too, but for the dtype of the whole model only
        for name, module in llm.named_modules():
            if name.rsplit(".", 1)[-1] in (llm._keep_in_fp32_modules or ()):
                module.to(torch.float32)
    return keep_layers(llm, config.encoder_layer)


def keep_layers(llm: PreTrainedModel, encoder_layer: int | None) -> PreTrainedModel:
    """Cut the LLM such that its `last_hidden_state` is `hidden_states[encoder_layer]` of the full one."""
    layers_in_full = llm.config.num_hidden_layers
    if encoder_layer is None or encoder_layer == layers_in_full:
        return llm
    for module in llm.modules():
        for layers in module.children():
            if isinstance(layers, nn.ModuleList) and len(layers) == layers_in_full:
                del layers[encoder_layer:]
                for name, child in module.named_children():
                    if "Norm" in type(child).__name__ and "emb" not in name:
                        setattr(module, name, nn.Identity())  # the last norm belongs to the full model's last state
                return llm
    raise ValueError(f"`encoder_layer` is not supported for a {llm.config.model_type} LLM: its layers were not found.")


def load_part(
    find_class: Callable[[Any], Any], part: str, name_or_path: str | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The LLM or SLM of the factory: the model given, else the one that `name_or_path` leads to."""
    if "model" in kwargs:
        model = kwargs["model"]
        expected = find_class(model.config)._model_mapping[type(model.config)]
        if not isinstance(model, expected):
            raise ValueError(f"`{part}_model` is a {type(model).__name__}. Pass a {expected.__name__}.")
        return model
    if name_or_path is None:
        raise ValueError(f"Pass `{part}_pretrained_model_name_or_path`, or a loaded model as `{part}_model`.")
    config, unused = kwargs.pop("config", None), kwargs
    if config is None:
        config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    # Arguments that changed the config are done with; those of the repository (revision, token, ...) are needed again.
    kwargs = {key: value for key, value in kwargs.items() if key in unused or not hasattr(config, key)}
    return find_class(config).from_pretrained(name_or_path, config=config, **kwargs)


def keep_special_ids(model: Any, before: dict[tuple[int, str], Any]) -> dict[tuple[int, str], Any]:
    """
    Take back what `Trainer` does at its start: for a processor it writes the end, start and pad ids of
    `processing_class.tokenizer`, here the LLM's, into the configs that answers are generated with, here the SLM's.

    Args:
        model: The model whose `config`, `config.decoder` and `generation_config` hold the ids.
        before: What this function returned last. An id that has become one of the LLM's since then is set back.

    Returns:
        The ids held now.
    """
    holders = (model.config, model.config.decoder, model.generation_config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    of_llm = {getattr(model.config.encoder, name, None) for name in names} - {None}
    held = {}
    for index, holder in enumerate(holders):
        for name in names:
            key, value = (index, name), getattr(holder, name, None)
            newest = value[0] if isinstance(value, list) and value else value
            if key in before and value != before[key] and newest in of_llm:
                logger.warning_once(
                    "The special ids of `processing_class.tokenizer` are the LLM's; the SLM's stay set."
                )
                setattr(holder, name, before[key])
            held[key] = getattr(holder, name, None)
    return held
