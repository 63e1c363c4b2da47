"""The configuration: two configs and how they meet, checked when it is built, the same after saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, PreTrainedConfig, T5Config

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from tests.support.common import END, LLM_VOCAB_SIZE, SLM_VOCAB_SIZE, gpt2_config, t5_config


PRESETS = Path(__file__).parents[2] / "configuration"


def test_defaults() -> None:
    config = LLM2SLMConfig()
    assert (type(config.encoder), type(config.decoder)) == (T5Config, GPT2Config)
    assert (config.fusion, config.shared_tokenizer, config.encoder_layer, config.freeze_llm) == (
        "add",
        False,
        None,
        True,
    )
    assert config.is_encoder_decoder
    assert config.model_type == "llm2slm"


@pytest.mark.parametrize("as_dict", [False, True], ids=["objects", "dicts"])
def test_any_two_configs_can_be_composed(as_dict: bool) -> None:
    encoder, decoder = t5_config(), gpt2_config()
    parts = (encoder.to_dict(), decoder.to_dict()) if as_dict else (encoder, decoder)
    config = LLM2SLMConfig(encoder=parts[0], decoder=parts[1])
    assert (type(config.encoder), config.encoder.vocab_size) == (T5Config, LLM_VOCAB_SIZE)
    assert (type(config.decoder), config.decoder.vocab_size) == (GPT2Config, SLM_VOCAB_SIZE)
    assert LLM2SLMConfig(encoder={"model_type": "t5", "d_model": 640}).encoder.d_model == 640


def test_the_given_configs_stay_unchanged() -> None:
    encoder, decoder = t5_config(), gpt2_config()
    before = (encoder.to_dict(), decoder.to_dict())
    config = LLM2SLMConfig(encoder=encoder, decoder=decoder)
    config.encoder.d_model, config.decoder.n_embd = 8, 8
    LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=encoder, decoder=decoder)).set_attn_implementation("eager")
    assert (encoder.to_dict(), decoder.to_dict()) == before


def test_sizes_are_the_slms() -> None:
    config = LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config())
    assert (config.vocab_size, config.hidden_size) == (SLM_VOCAB_SIZE, 32)
    assert config.get_text_config() is config.decoder
    assert config.get_text_config(decoder=True) is config.decoder
    assert config.get_text_config(encoder=True) is config.encoder


@pytest.mark.parametrize(
    ("slm_ids", "given", "expected"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4}, {}, (3, 4, 4)),
        ({"bos_token_id": None, "eos_token_id": 4}, {}, (4, 4, 4)),
        ({"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}, {}, (3, 0, 4)),
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, {}, (3, 4, [4, 5])),
        (
            {"bos_token_id": 3, "eos_token_id": 4},
            {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 0},
            (0, 1, 0),
        ),
        ({"bos_token_id": None, "eos_token_id": None}, {"eos_token_id": 9}, (9, 9, 9)),
    ],
)
def test_ids_left_out_come_from_the_slm(slm_ids: dict[str, Any], given: dict[str, Any], expected: tuple) -> None:
    config = LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(**slm_ids), **given)
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == expected
    model = LLM2SLMForConditionalGeneration(config)
    generation = model.generation_config
    assert (generation.decoder_start_token_id, generation.pad_token_id, generation.eos_token_id) == expected


def test_the_start_id_of_an_encoder_decoder_slm() -> None:
    config = LLM2SLMConfig(encoder=t5_config(), decoder=t5_config(decoder_start_token_id=7, pad_token_id=2))
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (7, 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fusion": "concat"}, "fusion.*'add'.*'replace'"),
        ({"encoder_layer": 4}, "encoder_layer.*3 layers"),
        ({"encoder_layer": -1}, "encoder_layer.*3 layers"),
        ({"encoder_layer": [1, 4]}, "encoder_layer.*3 layers"),
        ({"encoder_layer": []}, "encoder_layer.*3 layers"),
        ({"projector_layers": 0}, "projector_layers.*from 1"),
        ({"decoder": gpt2_config(bos_token_id=None, eos_token_id=None)}, "eos_token_id"),
        ({"decoder_start_token_id": SLM_VOCAB_SIZE}, "decoder_start_token_id.*98"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"eos_token_id": [2, 500]}, "eos_token_id.*500"),
        ({"decoder": gpt2_config(n_embd=30)}, "decoder.*30.*heads"),
        ({"decoder": gpt2_config(n_positions=1)}, "positions"),
        ({"encoder": t5_config(d_model=0)}, "encoder.*hidden size"),
        ({"encoder": {"d_model": 32}}, "model_type"),
    ],
)
def test_values_that_do_not_fit_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM2SLMConfig(**({"encoder": t5_config(), "decoder": gpt2_config()} | values))


@pytest.mark.parametrize("name", ["num_layers", "num_decoder_layers"])
def test_both_halves_of_an_encoder_decoder_slm_have_a_limited_number_of_layers(name: str) -> None:
    slm = t5_config()
    setattr(slm, name, 10**9)
    with pytest.raises(ValueError, match="`decoder` has 1000000000 layers, but a number up to 1000 is needed"):
        LLM2SLMConfig(encoder=t5_config(), decoder=slm)


def test_a_part_of_a_wrong_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="encoder.*str"):
        LLM2SLMConfig(encoder="google-t5/t5-large")


def without_place(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"fusion": "replace", "encoder_layer": 2, "freeze_llm": False},
        {"shared_tokenizer": True, "pad_token_id": 5, "eos_token_id": [END, 3], "decoder_start_token_id": 6},
        {"encoder_dtype": "bfloat16"},
    ],
)
def test_round_trip(values: dict[str, Any], tmp_path: Path) -> None:
    config = LLM2SLMConfig(encoder=t5_config("gated"), decoder=gpt2_config(), **values)
    config.save_pretrained(tmp_path / "first")
    loaded = AutoConfig.from_pretrained(tmp_path / "first")
    assert type(loaded) is LLM2SLMConfig
    assert (type(loaded.encoder), type(loaded.decoder)) == (T5Config, GPT2Config)
    assert without_place(loaded) == without_place(config)
    for name, value in values.items():
        assert getattr(loaded, name) == value
    loaded.save_pretrained(tmp_path / "second")
    files = [tmp_path / name / "config.json" for name in ("first", "second")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.json")), ids=lambda file: file.stem)
def test_presets(file: Path) -> None:
    """Each is a configuration that loads, and a model can be laid out from it."""
    config = LLM2SLMConfig.from_pretrained(file)
    with torch.device("meta"):
        model = LLM2SLMForConditionalGeneration(config)
    assert model.num_parameters() > 0
