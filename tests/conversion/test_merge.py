"""Merging: a LoRA adapter becomes part of the checkpoint that it adapts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion.merge import merge
from tests.support.common import PROMPTS, make_labels, pad_prompts
from tests.support.conversions import change_weights, edit, weights_of, write_sources


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_the_result_has_the_logits_of_base_and_adapter(sources, tmp_path):
    merge(sources / "adapter", tmp_path / "new")
    load = LLM2SLMForConditionalGeneration.from_pretrained
    merged, base = load(tmp_path / "new"), load(sources / "full")
    batch = {**pad_prompts(PROMPTS), "labels": make_labels()}
    plain = base(**batch).logits
    adapted = PeftModel.from_pretrained(base, sources / "adapter").eval()
    assert torch.allclose(merged(**batch).logits, adapted(**batch).logits, atol=1e-3)
    assert not torch.allclose(merged(**batch).logits, plain, atol=1e-1)
    names = weights_of(sources / "full").keys()
    assert weights_of(tmp_path / "new").keys() == names
    before, after = weights_of(sources / "full"), weights_of(tmp_path / "new")
    assert all(torch.equal(before[name], after[name]) for name in names if name.startswith("encoder.llm."))
    assert not torch.equal(before["encoder.projector.linear_1.weight"], after["encoder.projector.linear_1.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_its_dtype(dtype, sources, tmp_path):
    LLM2SLMForConditionalGeneration.from_pretrained(sources / "full", dtype=dtype).save_pretrained(tmp_path / "base")
    adapter = Path(shutil.copytree(sources / "adapter", tmp_path / "adapter"))
    change_weights(lambda tensors: [tensor.mul_(0.1) for name, tensor in tensors.items() if "lora_B" in name])(adapter)
    merge(adapter, tmp_path / "new", base=tmp_path / "base")
    assert LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new").dtype == dtype


def test_an_llm_inside_the_replaced_folder_is_kept(sources, tmp_path):
    for name in ("full", "llm"):
        shutil.copytree(sources / name, tmp_path / "model" / {"full": "", "llm": "llm"}[name], dirs_exist_ok=True)
    edit(tmp_path / "model", llm_source={"name_or_path": "./llm"})
    with pytest.raises(ValueError, match="which a lean checkpoint in .*model would replace"):
        merge(sources / "adapter", tmp_path / "model", base=tmp_path / "model", include_llm=False, overwrite=True)
    assert (tmp_path / "model" / "llm" / "model.safetensors").is_file()


def test_a_lean_result_loads_as_the_full_one(sources, tmp_path):
    merge(sources / "adapter", tmp_path / "lean", base=sources / "lean", include_llm=False)
    merge(sources / "adapter", tmp_path / "full")
    load = LLM2SLMForConditionalGeneration.from_pretrained
    states = [load(tmp_path / kind).state_dict() for kind in ("lean", "full")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not any(name.startswith("encoder.llm.") for name in weights_of(tmp_path / "lean"))


def test_a_pickled_adapter_is_not_read(sources, tmp_path):
    adapter = Path(shutil.copytree(sources / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(OSError, match="pickled weights are not read"):
        merge(adapter, tmp_path / "new")
