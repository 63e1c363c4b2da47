"""An LLM-to-SLM model that trains on stored hidden states: of the LLM, at most the embedding is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from ..checkpoint_llm2slm import LLM_PREFIX
from ..checks import CheckedModel
from ..configuration_llm2slm import LLM2SLMConfig
from ..fusion_llm2slm import fusion_of
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..parts_llm2slm import build_llm


class LLMEmbedding(PreTrainedModel):
    """
    Replaces the LLM: holds the LLM's embedding under its own name, or nothing.

    Args:
        config ([`LLM2SLMConfig`]): Its fusion reads the LLM's embedding table or not.
    """

    config: Any
    input_modalities = ("text",)
    # It has no attention layers, so every attention implementation works.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LLM2SLMConfig):
        with torch.device("meta"):
            llm = build_llm(config)  # before super(), which sets an attention implementation that not every LLM has
        super().__init__(config.encoder)
        self.llm_dtype = llm.dtype
        object.__setattr__(self, "llm", llm)  # not a module of this one: it has no weights
        embedding = llm.get_input_embeddings()
        self.path = next(name for name, module in llm.named_modules() if module is embedding)
        if fusion_of(config).table == "llm":
            module: nn.Module = self
            *parents, last = self.path.split(".")
            for parent in parents:
                module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.add_module(last, embedding)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: The LLM's, also without any weight of it."""
        return self.llm_dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding. Without one, raise `NotImplementedError`, as gradient checkpointing expects."""
        try:
            return self.get_submodule(self.path)
        except AttributeError as error:
            raise NotImplementedError("This model does not need the LLM's embedding, so it was not loaded.") from error

    def _init_weights(self, module: nn.Module) -> None:
        self.llm._init_weights(module)  # values that no checkpoint holds, as Gemma's scale

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "This model was loaded without its LLM: pass `llm_hidden_states` from a store of `llm2slm encode`, or "
            "load the model with `from_pretrained`."
        )


class LLM2SLMWithoutLLM(CheckedModel):
    """An [`LLM2SLMForConditionalGeneration`] without its LLM: it takes `llm_hidden_states`."""

    _keys_to_ignore_on_load_unexpected = [rf"^{re.escape(LLM_PREFIX)}"]  # noqa: RUF012 - as in all transformers models

    _auto_class = None  # its checkpoints are for this package: they bring no code

    def __init__(self, config: LLM2SLMConfig):
        super().__init__(config, encoder=LLMEmbedding(config))

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the weights that this model has, to resume training; [`with_llm`] makes a model to publish."""
        PreTrainedModel.save_pretrained(self, save_directory, **kwargs)


def load_without_llm(path: str | Path, **kwargs: Any) -> LLM2SLMWithoutLLM:
    """
    Load a checkpoint without its LLM: the projector, the SLM and, for fusion `"add"` with two tokenizers, the LLM's
    embedding. The model trains and generates from `llm_hidden_states`, which a [`StateStore`] holds.

    Args:
        path: A folder or a name on the Hub.
        kwargs: Arguments of `from_pretrained`.
    """
    return LLM2SLMWithoutLLM.from_pretrained(path, **kwargs)


def with_llm(model: nn.Module, path: str | Path, **kwargs: Any) -> LLM2SLMForConditionalGeneration:
    """
    Return the whole model: the trained weights of `model`, and the LLM of the checkpoint that `model` was loaded from.

    Args:
        model: A model of [`load_without_llm`], or one whose LLM was changed for training only (such as quantized).
        path: The checkpoint.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        ValueError: If `model` was loaded from another checkpoint.
    """
    whole = AutoModelForSeq2SeqLM.from_pretrained(path, **kwargs)
    trained = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(LLM_PREFIX)}
    # The missing keys are the LLM's, which `whole` has; each trained weight must have its place in `whole`.
    unexpected = whole.load_state_dict(trained, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} is not the checkpoint that this model was loaded from: it has no {unexpected[0]}.")
    return whole
