"""A model to train on stored LLM states: no weight of the LLM is loaded but, where fusion needs it, its embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_llm2slm import LLM2SLMConfig
from ..fusion_llm2slm import fusion_of
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..parts_llm2slm import build_llm


class LLMEmbedding(PreTrainedModel):
    """
    What stands in for the LLM: its embedding, under the name it has there, or nothing.

    Args:
        config ([`LLM2SLMConfig`]): Its fusion reads the LLM's embedding table or not.
    """

    config: Any
    input_modalities = ("text",)
    # It attends to nothing, so that any attention implementation will do.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LLM2SLMConfig):
        with torch.device("meta"):
            llm = build_llm(config)  # first, as the line below notes in the config what attends, and not every LLM can
        super().__init__(config.encoder)
        self.llm_class, self.llm_dtype = type(llm), llm.dtype
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
        """`torch.dtype`: The LLM's, also where nothing of it is here."""
        return self.llm_dtype

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; `NotImplementedError`, as gradient checkpointing expects, where there is none."""
        try:
            return self.get_submodule(self.path)
        except AttributeError as error:
            raise NotImplementedError("No embedding of the LLM is needed here, so none was loaded.") from error

    def _init_weights(self, module: nn.Module) -> None:
        self.llm_class._init_weights(self, module)  # sets what no checkpoint holds, such as the scale of a Gemma's

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "This model was loaded without its LLM: pass `llm_hidden_states` from a store of `llm2slm encode`, or "
            "load it with `from_pretrained`."
        )


class LLM2SLMWithoutLLM(LLM2SLMForConditionalGeneration):
    """An [`LLM2SLMForConditionalGeneration`] that has no LLM and takes `llm_hidden_states`."""

    _auto_class = None  # it saves no code, as it is loaded with this package only
    _keys_to_ignore_on_load_unexpected = [r"^encoder\.llm\."]  # noqa: RUF012 - as in every model of transformers

    def __init__(self, config: LLM2SLMConfig):
        super().__init__(config, encoder=LLMEmbedding(config))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves what is here, to go on training from, without a model card; [`with_llm`] makes a model to publish."""
        PreTrainedModel.save_pretrained(self, save_directory, **kwargs)


def load_without_llm(path: str | Path, **kwargs: Any) -> LLM2SLMWithoutLLM:
    """
    Loads projector and SLM of a checkpoint, and of its LLM only the embedding, and only where fusion `"add"` of two
    tokenizers reads it. The model trains and generates from `llm_hidden_states`, as [`StateStore`] has them.

    Args:
        path: A folder or a name on the Hub.
        kwargs: Arguments of `from_pretrained`.
    """
    return LLM2SLMWithoutLLM.from_pretrained(path, **kwargs)


def with_llm(model: nn.Module, path: str | Path, **kwargs: Any) -> LLM2SLMForConditionalGeneration:
    """
    The whole model: everything that trains from `model`, the LLM from the checkpoint `path` that `model` began as.

    Args:
        model: A model of [`load_without_llm`], or one whose LLM was changed for training only (quantized, ...).
        path: The checkpoint.
        kwargs: Arguments of `from_pretrained`.
    """
    whole = LLM2SLMForConditionalGeneration.from_pretrained(path, **kwargs)
    trained = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.llm.")}
    # What is missing is the LLM, which is there; what is trained has to have its place.
    unexpected = whole.load_state_dict(trained, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} is not the checkpoint that this model began as: it has no {unexpected[0]}.")
    return whole
