"""Sizes of SLMs follow from the LLM: none decodes slower than the LLM's own decoder, cut to a quarter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, PreTrainedConfig, T5Config, T5GemmaConfig

from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.settings import PlanSettings
from modeling_llm2slm.workflows.plan import plan
from modeling_llm2slm.workflows.sizes import QUARTER, SLMS, decoding_parameters, default_slms, quarter_of
from tests.support.checkpoints import PROMPTS, write_checkpoint


pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
T5_LARGE = {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 24, "num_decoder_layers": 24}
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12}
T5_100M = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 12, "num_decoder_layers": 12}
T5_SMALL = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "num_decoder_layers": 6}


@pytest.mark.parametrize(
    ("sizes", "presets", "layers"),
    [
        (T5_LARGE, set(SLMS), 6), (T5_BASE, {"t5-large_t5-small"}, 3), (T5_100M, set(), 3), (T5_SMALL, set(), 1),
    ],
)  # fmt: skip
def test_presets_are_tried_where_they_are_small_enough(sizes: dict[str, int], presets: set[str], layers: int) -> None:
    llm = T5Config(vocab_size=32128, **sizes)
    slms = default_slms(llm)
    assert slms.keys() == {*presets, QUARTER}
    cut = T5Config(vocab_size=32128, **{**sizes, "num_decoder_layers": layers})
    assert all(decoding_parameters(slm.decoder) <= decoding_parameters(cut) for slm in slms.values())
    decoder = slms[QUARTER].decoder
    assert (decoder.n_layer, decoder.n_embd, decoder.n_inner) == (layers, sizes["d_model"], sizes["d_ff"])


@pytest.mark.parametrize(
    "llm",
    [
        BartConfig(d_model=96, decoder_layers=8, encoder_layers=2, decoder_attention_heads=4),
        T5Config(d_model=90, num_layers=2, num_decoder_layers=8, num_heads=6),
        T5GemmaConfig(
            encoder={"num_hidden_layers": 2, "hidden_size": 96, "head_dim": 16},
            decoder={"num_hidden_layers": 8, "hidden_size": 96, "head_dim": 16},
            vocab_size=99,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_quarter_follows_from_every_family(llm: PreTrainedConfig) -> None:
    before = llm.to_dict()
    quarter = quarter_of(llm)
    assert quarter.n_layer == 2
    assert quarter.n_embd % quarter.n_head == 0
    assert QUARTER in default_slms(llm)
    assert llm.to_dict() == before


def test_plan_measures_what_can_then_be_built(tmp_path: Path) -> None:
    llm = write_checkpoint("llm", tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0] + "\n")
    result = plan(llm, tmp_path / "prompts.txt", PlanSettings(batch_size=1, max_new_tokens=4))
    candidates: dict[str, Any] = {row["name"]: row for row in result["candidates"]}
    assert candidates.keys() == {QUARTER}
    assert not candidates[QUARTER]["tokens_assumed"]
    slm = tmp_path / "quarter.json"
    slm.write_text(json.dumps(candidates[QUARTER]["slm_config"]))
    model = build(llm, str(slm)).model
    assert model.config.decoder.n_layer == 1
