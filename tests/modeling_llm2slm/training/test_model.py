"""The model of a training: in which form it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.training.model import load_to_train
from modeling_llm2slm.training.recipe import parse_recipe
from modeling_llm2slm.training.run import train


def test_unfrozen_llm_trains_in_float32(checkpoints, recipe, tmp_path):
    """In bfloat16 most steps are too small to move a weight."""
    model = TextToText.from_pretrained(checkpoints["llm2slm"], dtype="bfloat16")
    for freeze, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model.model.config.freeze_llm = freeze
        model.save_pretrained(tmp_path / str(freeze))
        ours, _ = parse_recipe({**recipe, "model": str(tmp_path / str(freeze))})
        assert load_to_train(ours).model.encoder.llm.dtype == dtype


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize("settings", [{}, {"lora": {}, "include_llm": False}])
def test_llm_that_changed_is_refused_before_training(recipe, checkpoints, tmp_path, settings):
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoints["llm2slm"])
    model.config.llm_source = {"name_or_path": "google-t5/t5-large", "fingerprint": "0" * 32}
    model.save_pretrained(tmp_path / "start")
    TextToText.from_pretrained(checkpoints["llm2slm"]).processor.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="it was changed"):
        train({**recipe, **settings, "model": str(tmp_path / "start")})
    assert not Path(recipe["output_dir"]).exists()
    if "lora" in settings:  # an adapter's checkpoints have no LLM to find again
        assert train({**recipe, "lora": {}, "model": str(tmp_path / "start"), "max_steps": 1})["steps"] == 1


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "("},
        {"alpha_pattern": {"(": 3}},
        {"rank_pattern": {"[": 3}},
        {"trainable_token_indices": [10**9]},
        {"layer_replication": [[0, 9]]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_an_option_of_lora_that_cannot_be_used_is_named(recipe, checkpoints, lora):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each option has its own message
        train({**recipe, "model": checkpoints["llm2slm"], "lora": lora, "max_steps": 1})
    assert "\n" not in str(caught.value)
