"""Adapters for the SLM: the LLM never trains, and a saved adapter holds exactly the trained tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, ia3_config, lora_config
from tests.support.common import FUSIONS, PROMPTS, build_model, make_labels, pad_prompts, same_tensors, t5_config


peft = pytest.importorskip("peft")

# peft 0.21 itself reads this property of every model it adapts.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def training_batch() -> dict[str, torch.Tensor]:
    return {**pad_prompts(PROMPTS), "labels": make_labels()}


METHODS: dict[str, Callable[[LLM2SLMForConditionalGeneration], Any]] = {
    "lora": lambda model: lora_config(model, r=4),
    "dora": lambda model: lora_config(model, r=4, use_dora=True),
    "ia3": ia3_config,
}


def adapt(model: LLM2SLMForConditionalGeneration, steps: int = 3, method: str = "lora") -> nn.Module:
    """The model with an adapter, after a few steps of training."""
    adapted = peft.get_peft_model(model, METHODS[method](model)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        adapted(**training_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**training_batch()).logits


@pytest.mark.parametrize("fusion", FUSIONS)
def test_lora_and_the_projector_train_and_the_llm_does_not(fusion: str) -> None:
    model = build_model(fusion)
    linears = [n for n, m in model.decoder.named_modules() if isinstance(m, nn.Linear | Conv1D) and n != "lm_head"]
    adapted = peft.get_peft_model(model, lora_config(model))
    adapted.train()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    in_full = {name for name in trained if ".modules_to_save." in name}
    lora = trained - in_full
    assert lora
    assert all(".decoder." in name and ".lora_" in name for name in lora)
    assert not [name for name in trained if ".llm." in name]
    assert {name.split(".lora_")[0].split(".decoder.")[1] for name in lora} == set(linears)
    expected = {"projector.linear_1", "projector.linear_2", *(["prompt_embedding"] if fusion == "add" else [])}
    assert {name.split(".modules_to_save.")[0].split(".encoder.")[1] for name in in_full} == expected
    assert not any(module.training for module in adapted.base_model.model.encoder.llm.modules())
    adapted(**training_batch()).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_adapter_loads_on_a_fresh_base(fusion: str, method: str, layers: int, tmp_path: Path) -> None:
    base = build_model(fusion, projector_layers=layers)
    base.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(base.state_dict())
    expected_start = logits_of(base)
    adapted = adapt(base, method=method)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted)
    assert not torch.allclose(expected, expected_start, atol=1e-3)

    fresh = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    same_tensors(fresh.state_dict(), before)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded), expected)
    kwargs = {**pad_prompts(PROMPTS), "max_new_tokens": 6, "do_sample": False}
    outputs = adapted.generate(**kwargs).tolist()
    assert loaded.generate(**kwargs).tolist() == outputs
    for name, parameter in loaded.named_parameters():
        if ".llm." in name:
            assert not parameter.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_adapter_file_holds_exactly_the_trained_tensors(fusion: str, method: str, tmp_path: Path) -> None:
    adapted = adapt(build_model(fusion), method=method)
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(parameter.numel() for parameter in trained)
    assert len(tensors) == len(trained)
    assert not [name for name in tensors if ".llm." in name or "wte" in name or "lm_head" in name]


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_has_the_logits_of_the_adapted_one(method: str, tmp_path: Path) -> None:
    adapted = adapt(build_model("add"), method=method)
    expected = logits_of(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is LLM2SLMForConditionalGeneration
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    reloaded, report = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(logits_of(reloaded), logits_of(merged))


def test_model_with_its_adapter_disabled_is_the_base() -> None:
    base = build_model("add")
    expected = logits_of(base)
    with adapt(base).disable_adapter():
        torch.testing.assert_close(logits_of(base), expected)


def test_overrides_replace_the_defaults_of_lora_config() -> None:
    config = lora_config(build_model("add"), r=3, lora_alpha=5, modules_to_save=["projector"])
    assert (config.r, config.lora_alpha, config.modules_to_save) == (3, 5, ["projector"])


def test_layers_to_transform_adapts_only_these_layers() -> None:
    model = build_model("add")
    with pytest.raises(ValueError, match="`layers_to_transform` needs a list of names too"):
        lora_config(model, layers_to_transform=[0])
    adapted = peft.get_peft_model(model, lora_config(model, layers_to_transform=[0], target_modules=["c_attn"]))
    lora = [name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" in name]
    assert lora
    assert all(".decoder." in name and ".h.0." in name for name in lora)


def test_lora_matches_an_encoder_decoder_slm() -> None:
    """The pattern is anchored at the SLM: a T5 has a `decoder` and `q`, `v` layers inside, whichever part it is."""
    model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=t5_config(), decoder=t5_config()))
    adapted = peft.get_peft_model(model, lora_config(model))
    lora = [name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" in name]
    assert lora
    assert not [name for name in lora if ".llm." in name]


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_dora_and_ia3_leave_the_llm_untrained(method: str) -> None:
    before = build_model("add").state_dict()
    adapted = adapt(build_model("add"), method=method)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    kinds = {"dora": ".lora_magnitude_vector.", "ia3": ".ia3_l."}
    assert [name for name in trained if kinds[method] in name and ".decoder." in name]
    assert not [name for name in trained if ".llm." in name]
    after = adapted.base_model.model.encoder.llm.state_dict()
    same_tensors(after, {name: before[f"encoder.llm.{name}"] for name in after})


@pytest.mark.parametrize("targets", ["all-linear", ["q", "v"], ["q", "v", "c_attn"], r".*\.(q|k|v|c_attn)"])
@pytest.mark.parametrize("excluded", [None, ["mlp.c_fc"], r".*\.c_fc"])
def test_target_modules_never_match_the_llm(targets: Any, excluded: Any) -> None:
    """LLM and SLM share layer names, and peft's "all-linear" means the whole model."""
    t5_slm = LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=t5_config(), decoder=t5_config()))
    for model in (build_model("add"), t5_slm):
        if targets == ["q", "v"] and not model.config.decoder.is_encoder_decoder:
            with pytest.raises(ValueError, match="exclude"):  # a GPT-2 has none of these
                peft.get_peft_model(model, lora_config(model, target_modules=targets, exclude_modules=excluded))
            continue
        adapted = peft.get_peft_model(model, lora_config(model, target_modules=targets, exclude_modules=excluded))
        lora = [name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" in name]
        assert lora
        assert all(name.startswith("base_model.model.decoder.") for name in lora)
        assert not [name for name in lora if excluded is not None and ".c_fc." in name]


def test_ia3_for_an_unknown_slm_is_an_error_that_names_the_fix() -> None:
    model = build_model("add")
    model.config.decoder.model_type = "nobodys"
    with pytest.raises(ValueError, match="pass `target_modules`"):
        ia3_config(model)
    assert ia3_config(model, target_modules=r"decoder\..*c_attn", feedforward_modules=[]).exclude_modules
