"""Checks that the installed package adds to the uploaded code: of configs, of LLM and SLM, and of a checkpoint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from .configuration_llm2slm import decoder_sizes, llm_sizes, max_positions, quirks_of
from .files_llm2slm import shape_of
from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .reserving import with_reserve


POSITIVE = ("num_attention_heads", "num_key_value_heads", "vocab_size")
MAX_LAYERS = 1000  # far more than any model has; building one takes time and memory even without its weights
# A config may ask for this much more than the files hold: 256 MB in float32, and masks, which are in no file.
FREE_PARAMETERS, FREE_BYTES = 2**26, 2**32
# A decoder-only SLM is called with these; without one of them, padding or the prompt embeddings would be lost.
SLM_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep")


class CheckedModel(LLM2SLMForConditionalGeneration):
    """The uploaded class, with checks of its parts and weights and a faster cache."""

    reserve = staticmethod(with_reserve)

    def post_init(self) -> None:
        """Check the parts before new weights are set, which runs them."""
        check_parts(self.encoder.llm, self.decoder)
        super().post_init()

    def check_weights(self, weights: Mapping[str, Any], path: str, any_size: bool) -> None:
        """
        Raise `ValueError` if a tensor of the checkpoint at `path` has another shape than its parameter, unless it may
        have `any_size`, or if the config asks for far more parameters than the files hold.
        """
        parameters = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        other = [name for name in parameters if name in weights and shape_of(weights[name]) != parameters[name]]
        if other and not any_size and not getattr(self, "is_quantized", False):
            name = other[0]
            raise ValueError(
                f"{name} has shape {shape_of(weights[name])} in the weights of {path}, but {parameters[name]} by its "
                "config. Correct the sizes in config.json."
            )
        missing = parameters.keys() - weights.keys() - self.all_tied_weights_keys.keys()
        new = sum(math.prod(parameters[name]) for name in [*missing, *other])
        held = sum(math.prod(shape_of(tensor)) for tensor in weights.values())
        masks = sum(tensor.nbytes for name, tensor in self.named_buffers() if name not in parameters)
        if new > held + FREE_PARAMETERS or masks > FREE_BYTES:
            raise ValueError(
                f"{path} holds {held:,} parameters, but its config asks for {new:,} others and {masks:,} bytes of "
                "masks. Correct the sizes in config.json."
            )


def check_config(config: Any) -> None:
    """Raise `ValueError` for values of a [`LLM2SLMConfig`] that no model can have."""
    for name in ("llm_source", "slm_source"):
        source = getattr(config, name) or {}
        if not all(value is None or isinstance(value, str) for value in source.values()):
            raise ValueError(f"`{name}` is {source!r}, but its values must be text.")
    llm, slm = config.encoder, config.decoder
    for part, values in (("config", config), ("encoder", llm), ("decoder", slm)):
        _check_outputs(values, part)
    check_sizes(llm_sizes(llm), "encoder")
    for half in (llm_sizes(slm), decoder_sizes(slm)):
        check_sizes(half, "decoder")
    _check_special_ids(config)
    layers = llm_sizes(llm).num_hidden_layers
    chosen = config.encoder_layer if isinstance(config.encoder_layer, list) else [config.encoder_layer or 0]
    if not chosen or not all(0 <= layer <= layers for layer in chosen):
        raise ValueError(
            f"`encoder_layer` is {config.encoder_layer!r}, but the LLM ({llm.model_type}) has {layers} layers. Use 0 "
            f"(the embeddings) to {layers}, a list of these, or None for its last hidden state."
        )
    if not 1 <= config.projector_layers <= MAX_LAYERS:
        raise ValueError(f"`projector_layers` is {config.projector_layers}, but must be from 1 to {MAX_LAYERS}.")
    positions = max_positions(slm)
    if not slm.is_encoder_decoder and positions is not None and positions < 2:
        raise ValueError(
            f"The SLM has {positions} positions, but prompt and output share them and need at least 2. Raise its "
            "`max_position_embeddings`."
        )


def _check_outputs(config: Any, part: str) -> None:
    layers = getattr(config, "output_hidden_states", None)
    if not all(isinstance(layer, int) for layer in (layers if isinstance(layers, list | tuple) else [layers or 0])):
        raise ValueError(
            f"`output_hidden_states` of the {part} is {layers!r}, but it must be true, false or a list of layers."
        )
    if getattr(config, "return_dict", True) is not True:
        raise ValueError(f"`return_dict` of the {part} is {config.return_dict!r}, but it must be true.")


def _check_special_ids(config: Any) -> None:
    slm = config.decoder
    for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value, fix = getattr(config, name), f"Pass `{name}=...`, an id of the SLM's tokenizer."
        if value is None:
            raise ValueError(f"`{name}` is not set and the SLM's config ({slm.model_type}) has none. {fix}")
        for token_id in value if isinstance(value, list) else [value]:
            if not 0 <= token_id < slm.vocab_size:
                known = f"ids from 0 to {slm.vocab_size - 1}"
                raise ValueError(f"`{name}` is {token_id}, but the SLM's vocabulary has {known}. {fix}")


def check_sizes(config: PreTrainedConfig, name: str) -> None:
    """Raise `ValueError` for sizes that no model can have, in the config called `name`."""
    hidden_size, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise ValueError(
            f"`{name}` ({config.model_type}) has hidden size {hidden_size!r}, but a positive one is needed. Pass the "
            "config of a text model; of a multimodal model, its `text_config`."
        )
    if layers is not None and not (isinstance(layers, int) and 1 <= layers <= MAX_LAYERS):
        raise ValueError(f"`{name}` has {layers!r} layers, but a number up to {MAX_LAYERS} is needed, and at least 1.")
    quirks, kind = quirks_of(config), f"`{name}` ({config.model_type})"
    for size in (*POSITIVE, quirks.head_size, quirks.feed_forward_size):
        value = getattr(config, size, None)
        values = value if isinstance(value, list) else [value]  # one for each layer
        if value is not None and not all(isinstance(one, int) and one > 0 for one in values):
            raise ValueError(f"{kind} has {size} {value!r}, but it must be a positive whole number.")
    heads, groups = (getattr(config, size, None) for size in POSITIVE[:2])
    if isinstance(heads, int) and not getattr(config, quirks.head_size, None) and hidden_size % heads:
        raise ValueError(
            f"{kind} has hidden size {hidden_size}, which is not divisible by its {heads} attention heads. Change one "
            "of the two."
        )
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(f"{kind} has {heads} attention heads, which {groups} key-value heads do not divide.")


def check_parts(llm: PreTrainedModel, slm: PreTrainedModel) -> None:
    """Raise `ValueError`, with the reason, for an LLM or SLM that the method cannot work with."""
    for model, part, reason in ((llm, "LLM", _why_not_llm(llm)), (slm, "SLM", _why_not_slm(slm))):
        if reason:
            raise ValueError(f"A {model.config.model_type} model cannot be the {part}: {reason}.")


def _why_not_llm(llm: PreTrainedModel) -> str | None:
    if missing := [name for name in ("input_ids", "attention_mask") if not _takes(llm, name)]:
        return f"it is not called with {' and '.join(missing)}"
    sizes = llm_sizes(llm.config)
    if getattr(sizes, quirks_of(llm.config).embedding_size) != sizes.hidden_size:
        return "the width of its hidden states is not its hidden size. Take another size of it"
    return None


def _why_not_slm(slm: PreTrainedModel) -> str | None:
    if slm.config.is_encoder_decoder:
        if not _takes(slm.get_encoder(), "inputs_embeds") or not _takes(slm, "encoder_outputs"):
            return "its encoder does not read embeddings"
        return None
    if slm._is_stateful:
        return "its state cannot return to an earlier token. Take one with attention only"
    no_decoder = getattr(slm.config, "is_decoder", True) is False and _takes(slm, "encoder_hidden_states")
    if no_decoder or type(slm.config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "it is an encoder, which sees the tokens it has to predict. Take a causal language model"
    missing = [name for name in SLM_ARGUMENTS if not _takes(slm, name)]
    return f"it is not called with {', '.join(missing)}" if missing else None


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
