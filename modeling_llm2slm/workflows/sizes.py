"""
The SLMs that a plan tries by default: for an encoder-decoder LLM, none decodes slower than the LLM's own decoder, cut
to a quarter; for a decoder-only LLM, the LLM cut to a quarter, a third and half of its layers.
"""

from __future__ import annotations

import copy
import re

import torch
from transformers import GPT2Config, PreTrainedConfig

from ..configuration_llm2slm import LLM2SLMConfig, llm_sizes, quirks_of
from ..conversion.build import preset_config
from ..conversion.cut import cut_config
from ..inference.parts import count_parameters, decoding_modules
from ..parts_llm2slm import slm_class
from ..settings import shown


# Presets with different SLMs, each with the checkpoint that its SLM starts from, whose tokenizer counts tokens.
SLMS = {"t5-large_gpt2": "openai-community/gpt2", "t5-large_t5-small": "google-t5/t5-small"}
QUARTER = "quarter"
SHARES = (4, 3, 2)  # of a decoder-only LLM's layers that its cuts keep
POSITIONS, HEAD_SIZE = 1024, 64


def default_slms(llm: PreTrainedConfig) -> dict[str, LLM2SLMConfig]:
    """
    Return configs of an LLM with SLMs, by name: the presets whose SLM is small enough for this LLM, and [`quarter_of`]
    it, as `QUARTER`. A decoder-only LLM is cut instead, as `cut:4` and others.

    Args:
        llm: The config of an LLM.
    """
    if not llm.is_encoder_decoder:
        layers = llm.get_text_config().num_hidden_layers
        return {name: cut_preset(llm, name) for name in (f"cut:{max(layers // share, 1)}" for share in SHARES)}
    largest = decoding_parameters(_with_quarter_of_layers(llm))
    presets = {preset: preset_config(preset) for preset in SLMS}
    fitting = {name: preset for name, preset in presets.items() if decoding_parameters(preset.decoder) <= largest}
    return {**fitting, QUARTER: LLM2SLMConfig(encoder=llm, decoder=quarter_of(llm))}


def cut_preset(llm: PreTrainedConfig, name: str) -> LLM2SLMConfig:
    """Return the config of a decoder-only LLM with layers of it behind it, which continue its keys and values."""
    layers = layers_to_cut(name)
    if llm.is_encoder_decoder or layers is None:
        raise ValueError(
            f"{name} is no SLM for a {llm.model_type}: a decoder-only LLM is cut (cut:4, cut:0,5,11,17), and an "
            "encoder-decoder takes a preset or a config file."
        )
    return LLM2SLMConfig(encoder=llm, decoder=cut_config(llm, layers), fusion="cache", shared_tokenizer=True)


def layers_to_cut(slm: str) -> int | list[int] | None:
    """Return the layers, or their number, in `cut:4` or `cut:0,5,11,17`; `None` for any other SLM."""
    if not slm.startswith("cut:"):
        return None
    layers = slm.removeprefix("cut:").split(",")
    if not all(re.fullmatch(r" *\d{1,9} *", layer) for layer in layers):
        raise ValueError(
            f"slm is {shown(slm)}, but a cut names layers of the LLM, or their number: cut:0,5,11,17 or cut:4."
        )
    return int(layers[0]) if len(layers) == 1 else [int(layer) for layer in layers]


def quarter_of(llm: PreTrainedConfig) -> GPT2Config:
    """Return the config of a GPT-2 with the width and vocabulary of an LLM, and a quarter of its decoder's layers."""
    decoder = _decoder_of(llm)
    width = decoder.hidden_size
    return GPT2Config(
        vocab_size=decoder.vocab_size,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=_quarter_of_layers(llm),
        n_head=next(heads for heads in range(max(width // HEAD_SIZE, 1), 0, -1) if width % heads == 0),
        n_inner=getattr(decoder, quirks_of(llm).feed_forward_size, None),
        bos_token_id=decoder.eos_token_id,
        eos_token_id=decoder.eos_token_id,
        pad_token_id=decoder.pad_token_id,
    )


def decoding_parameters(config: PreTrainedConfig) -> int:
    """Return the number of parameters that every output token of a model with this config passes through."""
    with torch.device("meta"):  # takes no memory
        return count_parameters(*decoding_modules(slm_class(config).from_config(config)))


def _with_quarter_of_layers(llm: PreTrainedConfig) -> PreTrainedConfig:
    cut = copy.deepcopy(llm)
    decoder, layers = _decoder_of(cut), _quarter_of_layers(llm)
    setattr(decoder, _name_of_layers(decoder), layers)
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = decoder.layer_types[:layers]
    return cut


def _quarter_of_layers(llm: PreTrainedConfig) -> int:
    decoder = _decoder_of(llm)
    return max(getattr(decoder, _name_of_layers(decoder)) // 4, 1)


def _decoder_of(llm: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that holds the decoder's sizes: the LLM's own, or the decoder's in it (T5Gemma)."""
    return llm if llm_sizes(llm) is llm else llm.get_text_config(decoder=True)


def _name_of_layers(decoder: PreTrainedConfig) -> str:
    return next(
        name for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers") if hasattr(decoder, name)
    )
