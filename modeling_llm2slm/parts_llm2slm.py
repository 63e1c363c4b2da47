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
"""The two parts of an LLM-to-SLM model: which models can take them, how they load, where the LLM is cut."""

import copy
import inspect
import re
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
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils import logging

from .configuration_llm2slm import LLM2SLMConfig, as_reader, llm_sizes


logger = logging.get_logger(__name__)

# What a decoder-only SLM is called with; without any of these, padding or the prompt's embeddings would be lost.
SLM_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep")


def llm_class(config: PreTrainedConfig) -> Any:
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def slm_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_llm(config: LLM2SLMConfig) -> PreTrainedModel:
    """The LLM of a configuration with new weights, in its own dtype."""
    dtype = getattr(torch, config.encoder_dtype) if config.encoder_dtype else torch.get_default_dtype()
    llm = reader_of(llm_class(config.encoder).from_config(config.encoder, dtype=dtype))
    if dtype == torch.float16:  # `from_pretrained` does this too, but for the dtype of the whole model only
        for name, module in llm.named_modules():
            if name.rsplit(".", 1)[-1] in (llm._keep_in_fp32_modules or ()):
                module.to(torch.float32)
    return keep_layers(llm, config.encoder_layer)


def reader_of(llm: PreTrainedModel) -> PreTrainedModel:
    """What of an LLM reads a prompt: an encoder-decoder's encoder (BART); no pooler over the states (BERT)."""
    if llm.config.is_encoder_decoder and llm_class(llm.config) is AutoModel:
        llm = llm.get_encoder()
    if getattr(llm, "pooler", None) is not None:
        llm.pooler = None
    # An encoder names its decoder's layers too, and FSDP does not take names of what is not there.
    here = {type(module).__name__ for module in llm.modules()}
    llm._no_split_modules = [name for name in llm._no_split_modules or () if name in here]
    return llm


def reading_arguments(llm: PreTrainedModel) -> dict[str, Any]:
    """Arguments of every call of the LLM: a decoder-only one would return a cache that nobody reads."""
    return {"use_cache": False} if "use_cache" in inspect.signature(llm.forward).parameters else {}


def keep_layers(llm: PreTrainedModel, encoder_layer: int | None) -> PreTrainedModel:
    """
    Cut the LLM such that its `last_hidden_state` is `hidden_states[encoder_layer]` of the full one. What is cut off
    may be in a checkpoint, and is not missed when that is loaded.
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
                    setattr(stack, child_name, nn.Identity())  # belongs to the full model's last state
                    cut.append(".".join([*name.split(".")[:-1], child_name]))
            llm._keys_to_ignore_on_load_unexpected = {rf"{re.escape(module)}\." for module in cut}
            return llm
    raise ValueError(
        f"`encoder_layer` is not supported for a {llm.config.model_type} LLM: its {layers_in_full} layers are not in "
        "one list. Leave it out."
    )


def load_llm(name_or_path: str | None, encoder_layer: int | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The LLM of the factory: the model given, else the one that `name_or_path` leads to; no layer above is loaded."""
    given = kwargs.get("model")
    if given is not None:
        llm = reader_of(_check_class(given, "encoder", llm_class))
        # The caller's model keeps its layers: the copy shares their weights.
        return llm if encoder_layer is None else keep_layers(_share(llm), encoder_layer)
    config, kwargs = _load_config(name_or_path, "encoder", kwargs)
    config = as_reader(config)
    auto_class = llm_class(config)
    if encoder_layer is None or type(config) not in auto_class._model_mapping:
        llm = reader_of(auto_class.from_pretrained(name_or_path, config=config, **kwargs))
        return keep_layers(llm, encoder_layer)

    model_class = auto_class._model_mapping[type(config)]

    class CutModel(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            reader = keep_layers(reader_of(self), encoder_layer)
            self._keys_to_ignore_on_load_unexpected = reader._keys_to_ignore_on_load_unexpected

    llm = CutModel.from_pretrained(name_or_path, config=config, **kwargs)
    llm.__class__ = model_class
    return reader_of(llm)


def load_slm(name_or_path: str | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The SLM of the factory: the model given, else the one that `name_or_path` leads to."""
    if kwargs.get("model") is not None:
        return _check_class(kwargs["model"], "decoder", slm_class)
    config, kwargs = _load_config(name_or_path, "decoder", kwargs)
    return slm_class(config).from_pretrained(name_or_path, config=config, **kwargs)


def _check_class(model: PreTrainedModel, part: str, find_class: Callable[[Any], Any]) -> PreTrainedModel:
    expected = find_class(model.config)._model_mapping[type(model.config)]
    if not isinstance(model, expected):
        raise ValueError(f"`{part}_model` is a {type(model).__name__}. Pass a {expected.__name__}.")
    return model


def _share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose tensors are those of the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _load_config(
    name_or_path: str | None, part: str, kwargs: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of a part, and the arguments that are left for its weights."""
    if name_or_path is None:
        raise ValueError(f"Pass `{part}_pretrained_model_name_or_path`, or a loaded model as `{part}_model`.")
    # Of parts that come from elsewhere no code is run and no pickle read unless the caller says so.
    kwargs = {"trust_remote_code": False, "use_safetensors": True} | kwargs
    config, unused = kwargs.pop("config", None), kwargs
    if config is None:
        config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    # Arguments that changed the config are done with; those of the repository (revision, token, ...) are needed again.
    return config, {key: value for key, value in kwargs.items() if key in unused or not hasattr(config, key)}


def check_parts(llm: PreTrainedModel, slm: PreTrainedModel) -> None:
    """Raise `ValueError`, with the reason, for an LLM or SLM that the method cannot work with."""
    reason = _why_not_llm(llm)
    if reason:
        raise ValueError(f"A {llm.config.model_type} model cannot be the LLM: {reason}.")
    reason = _why_not_slm(slm)
    if reason:
        raise ValueError(f"A {slm.config.model_type} model cannot be the SLM: {reason}.")


def _why_not_llm(llm: PreTrainedModel) -> str | None:
    missing = [name for name in ("input_ids", "attention_mask") if not _takes(llm, name)]
    if missing:
        return f"it is not called with {' and '.join(missing)}"
    sizes = llm_sizes(llm.config)
    if getattr(sizes, "word_embed_proj_dim", sizes.hidden_size) != sizes.hidden_size:
        return "its states do not have its hidden size. Take another size of it"
    return None


def _why_not_slm(slm: PreTrainedModel) -> str | None:
    if slm.config.is_encoder_decoder:
        if not _takes(slm.get_encoder(), "inputs_embeds") or not _takes(slm, "encoder_outputs"):
            return "its encoder does not read embeddings"
        return None
    if slm._is_stateful:
        return "it carries a state that cannot go back to an earlier token. Take one with attention only"
    no_decoder = getattr(slm.config, "is_decoder", True) is False and _takes(slm, "encoder_hidden_states")
    if no_decoder or type(slm.config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "it is an encoder, which sees the tokens it has to predict. Take a causal language model"
    missing = [name for name in SLM_ARGUMENTS if not _takes(slm, name)]
    return f"it is not called with {', '.join(missing)}" if missing else None


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def rms(values: Any) -> float:
    """The root mean square of a tensor."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float32)) / values.numel() ** 0.5


@torch.no_grad()
def embedding_rms(model: PreTrainedModel) -> float:
    """Root mean square of what a model's embedding gives (Gemma's scales) for up to 4,096 tokens of its vocabulary."""
    embedding = model.get_input_embeddings()
    return rms(embedding(probe_ids(embedding.weight, 4096)))


def probe_ids(table: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` token ids, spread over a vocabulary."""
    step = max(table.shape[0] // count, 1)
    return torch.arange(0, table.shape[0], step, device=table.device)[:count]


def keep_special_ids(model: Any, before: dict[tuple[int, str], Any]) -> dict[tuple[int, str], Any]:
    """
    Take back what `Trainer` does at its start: for a processor it writes the end, start and pad ids of
    `processing_class.tokenizer`, here the LLM's, into the configs that answers are generated with, here the SLM's.

    Args:
        model: The model whose `config`, `config.decoder` and `generation_config` hold the ids.
        before: What this function returned last. An id that has since become one of the LLM's or none of the SLM's
            vocabulary, or the same in one of the configs and in `generation_config`, is set back.

    Returns:
        The ids held now.
    """
    holders = (model.config, model.config.decoder, model.generation_config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    held = {(index, name): getattr(holder, name, None) for index, holder in enumerate(holders) for name in names}
    changed = {key for key, value in held.items() if key in before and value != before[key]}
    if not any(index < 2 for index, _ in changed):
        return held  # `Trainer` writes into a config as well; who sets up generation does not
    of_llm = {token_id for name in names for token_id in _as_ids(getattr(model.config.encoder, name, None))}
    newest = {(index, name): next(iter(_as_ids(held[index, name])), None) for index, name in changed}
    for (index, name), token_id in newest.items():
        # An id that the LLM's tokenizer has and its config has not. `Trainer` writes into one config, users into both.
        written = [newest[key] for key in ((0, name), (1, name), (2, name)) if key in newest]
        aligned = (2, name) in newest and len(written) == 2 and len(set(written)) == 1
        outside = token_id is not None and token_id >= model.config.vocab_size
        if aligned or outside or token_id in of_llm or token_id == getattr(model.config.encoder, name, None):
            logger.warning_once("The special ids of `processing_class.tokenizer` are the LLM's; the SLM's stay set.")
            setattr(holders[index], name, before[index, name])
            held[index, name] = before[index, name]
    return held


def _as_ids(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return token_ids if isinstance(token_ids, list) else [token_ids]
