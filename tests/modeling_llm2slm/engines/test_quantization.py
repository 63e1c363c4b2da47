"""Quantized models: nearly the same hidden states in less memory, and everything else unchanged."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.engines import quantization
from modeling_llm2slm.engines.quantization import QUANTIZATIONS, quantize, quantize_llm, with_linear_layers
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.fingerprints import llm_fingerprint
from modeling_llm2slm.training.run import train
from tests.support.checkpoints import write_pairs
from tests.support.common import (
    PROMPTS,
    gpt2_config,
    llm_tokenizer,
    make_labels,
    pad_prompts,
    slm_tokenizer,
    t5_config,
)
from tests.support.sizes import nbytes


LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao")


def needs(to: str) -> None:
    if importlib.util.find_spec(LIBRARIES[to]) is None:
        pytest.skip(f"needs {LIBRARIES[to]}: pip install 'modeling-llm2slm[quantization]'")


def make_model(**overrides: Any) -> LLM2SLMForConditionalGeneration:
    torch.manual_seed(0)
    llm, slm = t5_config(d_model=64, d_kv=32, d_ff=128, num_heads=2), gpt2_config(n_embd=64)
    return LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=llm, decoder=slm, **overrides)).eval()


def test_rows_that_are_not_whole_blocks_are_not_quantized() -> None:
    """There the error of the CPU kernel is a multiple of NF4's rounding."""
    needs("nf4")
    model = make_model()
    model.decoder.narrow = nn.Sequential(nn.Linear(32, 96), nn.Linear(96, 64), nn.Linear(64, 32))
    quantize(model, "nf4")
    kinds = [type(layer).__name__ for layer in model.decoder.narrow]
    assert kinds == ["Linear", "Linear", "Linear4bit"]


@pytest.mark.parametrize(("to", "error", "part"), [("int8", 0.03, 0.5), ("nf4", 0.25, 0.7)])
def test_hidden_states_are_near_and_memory_is_saved(to: str, error: float, part: float) -> None:
    needs(to)
    model, whole = make_model(), make_model()
    quantize_llm(model, to)
    batch = pad_prompts(PROMPTS)
    states, expected = model.encode_llm(**batch), whole.encode_llm(**batch)
    assert 0 < float((states - expected).norm() / expected.norm()) < error
    matrices = nbytes(whole.encoder.llm) - whole.encoder.llm.shared.weight.nbytes
    assert nbytes(model.encoder.llm) - model.encoder.llm.shared.weight.nbytes < part * matrices
    for name, parameter in model.named_parameters():
        if ".llm." not in name:
            assert torch.equal(parameter, whole.get_parameter(name))


def test_linear_layers_do_not_change_a_gpt2() -> None:
    model, whole = make_model(), make_model()
    with_linear_layers(model.decoder)
    assert not any(type(module).__name__ == "Conv1D" for module in model.modules())
    batch = {**pad_prompts(PROMPTS), "labels": make_labels()}
    torch.testing.assert_close(model(**batch).logits, whole(**batch).logits)


def test_a_gpt2_as_the_llm_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=gpt2_config(n_embd=64), decoder=gpt2_config()))
    found: list[nn.Module] = []
    monkeypatch.setattr(quantization, "_to_int8", lambda llm: found.extend(llm.modules()))
    quantize_llm(model, "int8")
    assert sum(isinstance(module, nn.Linear) for module in found) == 4 * model.config.encoder.n_layer


@pytest.mark.parametrize(("to", "error", "part"), [("int8", 0.05, 0.5), ("nf4", 0.5, 0.5)])
def test_a_model_that_generates_is_quantized_as_a_whole(to: str, error: float, part: float) -> None:
    needs(to)
    model, whole = make_model(), make_model()
    quantize(model, to)
    batch = {**pad_prompts(PROMPTS), "labels": make_labels()}
    with torch.no_grad():
        logits, expected = model(**batch).logits, whole(**batch).logits
    assert 0 < float((logits - expected).norm() / expected.norm()) < error
    blocks, before = model.decoder.transformer.h, whole.decoder.transformer.h
    assert nbytes(blocks) < part * nbytes(before)
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    outputs = model.generate(**pad_prompts(PROMPTS), max_new_tokens=4)
    assert outputs.shape[0] == len(PROMPTS)


@pytest.mark.parametrize("to", QUANTIZATIONS)
def test_everything_but_the_llm_trains(to: str) -> None:
    needs(to)
    model = make_model()
    quantize_llm(model, to)
    model.train()
    model(**pad_prompts(PROMPTS), labels=make_labels()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".llm." not in name), name


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("to", QUANTIZATIONS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_recipe_with_a_quantized_llm_saves_the_llm_unchanged(to: str, lora: Any, tmp_path: Path) -> None:
    needs(to)
    make_model().save_pretrained(tmp_path / "model")
    LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer()).save_pretrained(tmp_path / "model")
    recipe: dict[str, Any] = {
        "model": str(tmp_path / "model"), "train_data": write_pairs(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "out"), "max_steps": 2, "logging_steps": 1, "quantize_llm": to, "lora": lora,
        "disable_tqdm": True,
    }  # fmt: skip
    report = train(recipe)
    assert report["steps"] == 2
    assert llm_fingerprint(tmp_path / "out") == llm_fingerprint(recipe["model"])
    assert train({**recipe, "max_steps": 4})["resumed_at_step"] == 2


def _config_of(to: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if to == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("to", QUANTIZATIONS)
def test_transformers_can_quantize_the_llm_while_loading(to: str, tmp_path: Path) -> None:
    needs(to)
    whole = make_model()
    whole.encoder.llm.save_pretrained(tmp_path)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        str(tmp_path),
        decoder_model=whole.decoder,
        encoder_quantization_config=_config_of(to),
        shared_tokenizer=False,
    )
    assert model.decoder.dtype == torch.float32
    batch = pad_prompts(PROMPTS)
    states, expected = model.encode_llm(**batch), whole.encode_llm(**batch)
    assert 0 < float((states - expected).norm() / expected.norm()) < 0.25
    assert nbytes(model.encoder.llm) < 0.5 * nbytes(whole.encoder.llm)
    model.train()(**batch, labels=make_labels()).loss.backward()
    assert model.encoder.projector.linear_1.weight.grad is not None


def test_unknown_quantizations_and_trained_llms_are_refused() -> None:
    with pytest.raises(ValueError, match="not to 'int3'"):
        quantize_llm(make_model(), "int3")
    with pytest.raises(ValueError, match="not to 'int3'"):
        quantize(make_model(), "int3")
    with pytest.raises(ValueError, match="freeze_llm=True"):
        quantize_llm(make_model(freeze_llm=False))


@pytest.mark.parametrize("to", QUANTIZATIONS)
def test_a_missing_library_is_named(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    original = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == LIBRARIES[to]:
            raise ModuleNotFoundError(f"No module named {LIBRARIES[to]!r}", name=LIBRARIES[to])
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"needs {LIBRARIES[to]}.*modeling-llm2slm\[quantization\]"):
        quantize_llm(make_model(), to)


@pytest.mark.parametrize(("to", "library"), QUANTIZATIONS.items())
def test_the_library_is_checked_before_a_model_is_loaded(
    to: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "is_installed", lambda package: False)
    with pytest.raises(ImportError, match=f"Quantizing to {to} needs {library}: pip install"):
        TextToText.from_pretrained("no/such/folder", quantize=to)
