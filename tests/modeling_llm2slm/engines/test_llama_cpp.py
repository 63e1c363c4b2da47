"""llama.cpp: the tokens of PyTorch, from a GGUF file and from the keys and values of an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from modeling_llm2slm import ExportedLLM2SLM, TextToText
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.engines import llama_cpp
from modeling_llm2slm.engines.gguf import check_family, write_gguf
from modeling_llm2slm.engines.llama_cpp import LlamaCppGraph
from modeling_llm2slm.engines.llama_cpp_t5 import LlamaCppT5
from modeling_llm2slm.inference.engine import engine
from tests.support import families
from tests.support.common import PROMPTS, pad_prompts
from tests.support.exports import (
    Pair,
    check_continuation,
    check_prompt_lengths,
    check_strategies,
    check_threads,
    checkpoint,
    learned,
    needs,
    pair_of,
)


KINDS = (
    ("gpt2", "add_shared"), ("llama", "add_shared"),
    ("gemma3", "cache"), ("gpt2", "cache_again"), ("llama", "cache"), ("qwen3", "cache"),
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory, *request.param, "llamacpp")


def test_strategies_give_the_tokens_of_pytorch(pair: Pair) -> None:
    assert isinstance(pair.exported.graphs["step"], LlamaCppGraph)
    check_strategies(pair)
    check_continuation(pair)
    check_threads(pair)


def test_a_prompt_of_one_token_and_one_longer_than_a_sliding_window(pair: Pair) -> None:
    check_prompt_lengths(pair)


def test_outputs_outgrow_their_context(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "AHEAD", 1)
    pair.exported.graphs["step"].unused.clear()
    for options in ({}, {"num_beams": 3}):
        expected, found = pair.outputs(**pad_prompts(PROMPTS), max_new_tokens=14, min_new_tokens=14, **options)
        assert torch.equal(expected, found)


def test_contexts_are_used_again(pair: Pair) -> None:
    step = pair.exported.graphs["step"]
    step.unused.clear()
    for batch in (PROMPTS, PROMPTS[:1], PROMPTS[:2]):
        assert torch.equal(*pair.outputs(**pad_prompts(batch)))
    assert len(step.unused) == 1


def test_weights_in_int8(tmp_path: Path) -> None:
    needs("llamacpp")
    folder = checkpoint("gemma3", "cache", tmp_path / "model")
    report = export(folder, tmp_path / "int8", engine="llamacpp", weights="int8")
    assert "int8" in report.title
    pair = Pair(learned("gemma3", "cache"), ExportedLLM2SLM.from_pretrained(tmp_path / "int8"))
    assert torch.equal(*pair.outputs(**pad_prompts(PROMPTS)))  # a model that knows its outputs by heart keeps them
    assert (tmp_path / "int8" / "openvino_prompt.xml").is_file()


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "smollm", "qwen3"])
def test_a_decoder_only_model_alone(family: str, tmp_path: Path) -> None:
    needs("llamacpp")
    torch.manual_seed(0)
    model = families.build_slm(family).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "fast", engine="llamacpp")
    fast = engine("llamacpp").export(model, _empty(tmp_path / "loaded"), "fp32")
    batch = pad_prompts(PROMPTS, "left")
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected, found = (one.generate(**batch, **options) for one in (model, fast))
        assert torch.equal(expected, found)
    assert len(set(found[0].tolist())) > 3


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_rotary_frequencies_of_llama_3(tmp_path: Path) -> None:
    needs("llamacpp")
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, rope_parameters=rope, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    fast = engine("llamacpp").export(model, _empty(tmp_path / "fast"), "fp32")
    ids = torch.randint(10, 200, (2, 40))
    torch.testing.assert_close(fast(input_ids=ids).logits, model(ids).logits[:, -1:], rtol=1e-3, atol=1e-2)


def test_attention_with_a_bias(tmp_path: Path) -> None:
    needs("llamacpp")
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.3)
    fast = engine("llamacpp").export(model, _empty(tmp_path / "fast"), "fp32")
    ids = torch.randint(10, 200, (2, 12))
    torch.testing.assert_close(fast(input_ids=ids).logits, model(ids).logits[:, -1:], rtol=1e-3, atol=1e-2)


def test_other_rotary_embeddings_are_refused() -> None:
    model = families.build_slm("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="The rotary embedding of this llama is dynamic"):
        check_family(model)


def test_an_output_beyond_the_positions_of_gpt2_is_refused(tmp_path: Path) -> None:
    needs("llamacpp")
    model = families.build_slm("gpt2").eval()
    fast = engine("llamacpp").export(model, _empty(tmp_path / "fast"), "fp32")
    most = model.config.n_positions
    with pytest.raises(ValueError, match=f"only {most} positions. Shorten the prompt"):
        fast.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=most, min_new_tokens=most, pad_token_id=0)


def test_too_many_outputs_at_once_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = pair_of(tmp_path_factory, "gemma3", "cache", "llamacpp")
    with pytest.raises(ValueError, match="at most 256 outputs at once, and this batch has 300"):
        pair.exported.generate(torch.tensor(PROMPTS[:1] * 300), max_new_tokens=2)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    needs("llamacpp")
    folder = checkpoint("gemma3", "cache", tmp_path / "model")
    export(folder, tmp_path / "fast", engine="llamacpp")
    file = tmp_path / "fast" / "step.gguf"
    for content in (b"", file.read_bytes()[:1000]):
        file.write_bytes(content)
        with pytest.raises(OSError, match="step.gguf is missing or damaged"):
            TextToText.from_pretrained(tmp_path / "fast")


@pytest.mark.parametrize(("slm", "message"), [("t5", "decoder-only SLMs"), ("opt", "and not opt")])
def test_other_slms_are_refused(slm: str, message: str, tmp_path: Path) -> None:
    needs("llamacpp")
    folder = checkpoint(slm, "replace", tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "fast", engine="llamacpp")
    assert not (tmp_path / "fast").exists()


def test_sliding_windows_of_other_families_are_refused() -> None:
    model = families.build_slm("qwen3")
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    with pytest.raises(ValueError, match="no sliding-window layers of qwen3"):
        check_family(model)


@pytest.mark.parametrize("options", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_a_t5_generates_the_same_tokens(options: dict[str, Any], tmp_path: Path) -> None:
    needs("llamacpp")
    config = T5Config(
        vocab_size=200, d_model=64, d_kv=32, num_heads=2, d_ff=96, num_layers=3, num_decoder_layers=2,
        decoder_start_token_id=0, eos_token_id=None, initializer_factor=3.0, **options,
    )  # fmt: skip
    torch.manual_seed(3)  # llama.cpp's GELU is a table in float16: outputs of some random models differ
    llm = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(10, 200, (4, 14), generator=torch.Generator().manual_seed(0))
    write_gguf(llm, tmp_path / "f32.gguf", "F32")
    write_gguf(llm, tmp_path / "q8.gguf", "Q8_0")
    expected = llm.generate(ids, max_new_tokens=20, do_sample=False)[:, 1:].tolist()
    assert len({token for row in expected for token in row}) > 3
    fast = LlamaCppT5(tmp_path / "f32.gguf", kind="float32")
    assert fast(ids, 20, 1) == expected
    assert fast(ids[:1], 9, 1) == [expected[0][:9]]
    with pytest.raises(ValueError, match="no beam search"):
        fast(ids, 20, 4)
    assert (tmp_path / "q8.gguf").stat().st_size < (tmp_path / "f32.gguf").stat().st_size / 2
