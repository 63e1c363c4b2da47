"""Models that cannot work are refused, with the reason, when the composite is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    BloomConfig,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    OPTModel,
)

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import write_checkpoint
from tests.support.families import LLMS, build_llm, build_slm


Model = LLM2SLMForConditionalGeneration

DECODER: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 98}
REFUSED_SLMS = {
    "bert": (BertConfig(**DECODER, num_attention_heads=4, intermediate_size=64), "an encoder, which sees the tokens"),
    "bert_generation": (
        BertGenerationConfig(**DECODER, num_attention_heads=4, intermediate_size=64),
        "an encoder, which sees the tokens",
    ),
    "mamba": (MambaConfig(**DECODER, state_size=4), "its state cannot return"),
    "bloom": (BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, eos_token_id=98), "position_ids"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED_SLMS.values(), ids=REFUSED_SLMS)
def test_slms_that_cannot_work_are_refused(config: Any, reason: str, tmp_path: Path) -> None:
    slm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"A {config.model_type} model cannot be the SLM: .*{reason}"):
        Model.from_encoder_decoder_pretrained(encoder_model=build_llm("t5"), decoder_model=slm)
    with pytest.raises(ValueError, match="cannot be the SLM"):
        Model(LLM2SLMConfig(encoder=LLMS["t5"].config(vocab_size=120), decoder=config))


def test_an_llm_whose_hidden_states_have_another_size_is_refused() -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=120, num_hidden_layers=2, do_layer_norm_before=False, **sizes)
    with pytest.raises(
        ValueError, match="A opt model cannot be the LLM: the width of its hidden states is not its hidden size"
    ):
        Model.from_encoder_decoder_pretrained(encoder_model=OPTModel(config), decoder_model=build_slm("gpt2"))


def test_a_multimodal_config_is_refused() -> None:
    with pytest.raises(ValueError, match="its `text_config`"):
        LLM2SLMConfig(encoder={"model_type": "clip"}, decoder=GPT2Config())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"output_hidden_states": "x"},
            "`output_hidden_states` of the {} is 'x', but it must be true, false or a list",
        ),
        ({"output_hidden_states": 0.5}, "`output_hidden_states` of the {} is 0.5"),
        ({"output_hidden_states": [1, "x"]}, "`output_hidden_states` of the {} is"),
        ({"return_dict": False}, "`return_dict` of the {} is False, but it must be true"),
    ],
)
def test_outputs_that_no_model_can_give_are_refused(part: str, values: dict[str, Any], message: str) -> None:
    configs = {"encoder": LLMS["t5"].config(vocab_size=120), "decoder": GPT2Config(vocab_size=99, eos_token_id=98)}
    for name, value in values.items():
        setattr(configs[part], name, value)
    with pytest.raises(ValueError, match=message.format(part)):
        LLM2SLMConfig(**configs)


def test_a_checkpoint_without_its_processor_is_named(tmp_path: Path) -> None:
    path = Path(write_checkpoint("llm2slm", tmp_path))
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(OSError, match="processor_config.json is damaged or missing"):
        TextToText.from_pretrained(path)
