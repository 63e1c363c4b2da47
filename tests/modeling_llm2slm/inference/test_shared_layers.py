"""Fusion "cache" is refused, with the reason, where the SLM does not share layers of the LLM."""

from __future__ import annotations

from typing import Any

import pytest

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from tests.support import families
from tests.support.common import gpt2_config, t5_config


def config_of(family: str = "llama", slm: Any = None, **values: Any) -> LLM2SLMConfig:
    own = {"shared_tokenizer": True, "decoder_layers": families.SHARED_LAYERS, **values}
    llm, slm = families.build_whole(family).config, families.SLMS[family].config() if slm is None else slm
    return LLM2SLMConfig(encoder=llm, decoder=slm, fusion="cache", **own)


@pytest.mark.parametrize("family", families.SHARING)
def test_an_slm_of_layers_of_the_llm_fits(family: str) -> None:
    slm = families.SLMS[family].config()
    slm.cut_from_layers = [0, 2]
    assert config_of(family, slm, decoder_layers=None).decoder_layers == [0, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slm": gpt2_config()}, "the LLM is a llama model, and the SLM a gpt2 model"),
        ({"slm": families.SLMS["t5"].config()}, "the SLM is a t5, and only decoder-only models share"),
        ({"shared_tokenizer": False}, "LLM and SLM have different tokenizers"),
        ({"encoder_layer": 2}, "`encoder_layer` is set"),
        ({"freeze_llm": False}, "an LLM that trains"),
        ({"decoder_layers": None}, "`decoder_layers` is not set"),
        ({"decoder_layers": [0]}, "`decoder_layers` is \\[0\\], but must name, for each of the 2 layers"),
        ({"decoder_layers": [0, 3]}, "a layer of the LLM from 0 to 2"),
        ({"decoder_layers": [-1, 2]}, "a layer of the LLM from 0 to 2"),
        ({"slm": families.SLMS["llama"].config(num_key_value_heads=4)}, "key heads and head size is \\(4, 8\\)"),
        ({"slm": families.SLMS["llama"].config(head_dim=16)}, "key heads and head size is \\(2, 16\\)"),
        (
            {"slm": families.SLMS["llama"].config(rope_parameters={"rope_type": "default", "rope_theta": 7.0})},
            "rope_para",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_layers": [1, 0]}, "layer_types is \\['sliding_attention', 'full_attention'\\] in the SLM"),
        ({"slm": families.SLMS["gemma3"].config(sliding_window=4)}, "sliding_window is 4 in the SLM, but 8"),
    ],
)
def test_layers_of_another_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of("gemma3", **values)


def test_an_encoder_decoder_llm_is_refused() -> None:
    with pytest.raises(ValueError, match="the LLM is a t5, and only decoder-only models share keys and values"):
        LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(), fusion="cache", shared_tokenizer=True)


def test_other_fusions_have_no_shared_layers() -> None:
    with pytest.raises(ValueError, match="`decoder_layers` is for `fusion=\"cache\"`, not for 'add'"):
        LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(), decoder_layers=[0, 1])


def test_an_llm_without_its_head_is_refused() -> None:
    llm = families.build_whole("llama").base_model
    with pytest.raises(ValueError, match="`encoder_model` is a LlamaModel. Pass a LlamaForCausalLM"):
        LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
            encoder_model=llm, decoder_model=families.build_slm("llama"), fusion="cache", shared_tokenizer=True,
            decoder_layers=[0, 2],
        )  # fmt: skip
