"""Contestants: outputs of the length that a cell asks for, on PyTorch and on engines without `generate()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_llm2slm.benchmark import benchmark
from modeling_llm2slm.benchmark import contestants as module
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.benchmark.contestants import endless, load_contestant
from modeling_llm2slm.benchmark.llama_cpp import LlamaCpp, write_gguf
from modeling_llm2slm.benchmark.models import make_models
from modeling_llm2slm.inference.engine import Contestant, engine
from tests.support.exports import needs


def test_outputs_have_the_length_of_the_cell(measured: tuple[Path, dict[str, Any]]) -> None:
    """An end token among the outputs of random weights would make a model look fast."""
    models = make_models("tiny", measured[0] / "tiny")
    model: Any = endless(engine("pytorch").contestants()["llm2slm"].load(models, models.folder, "cpu"))
    lengths = []
    for _ in range(20):
        ids = torch.randint(10, model.config.encoder.vocab_size, (1, 6))
        lengths.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30).shape[1])
    assert set(lengths) == {31}


def test_a_function_is_timed_at_two_lengths(
    measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[int, ...], int, int]] = []

    def generate(ids: torch.Tensor, new_tokens: int, num_beams: int) -> None:
        calls.append((tuple(ids.shape), new_tokens, num_beams))

    contestant = Contestant(load=lambda models, folder, device: generate, model="llm")
    monkeypatch.setattr(module, "contestants", lambda: {"function": contestant})
    timing = load_contestant("function", make_models("tiny", measured[0] / "tiny"), "cpu")(
        Cell(prompt=6, output=9, batch=2, beams=4)
    )
    assert calls == [((2, 6), 1, 4), ((2, 6), 9, 4)]
    assert timing.tokens == 9
    assert timing.per_token == pytest.approx((timing.total - timing.first) / 8)


def test_the_llm_generates_the_same_tokens_on_another_engine(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    needs("openvino")
    models = make_models("tiny", measured[0] / "tiny")
    contestant = engine("openvino").contestants()["llm-openvino-fp32"]
    assert contestant.model == "llm"
    assert contestant.make is not None
    contestant.make(models, tmp_path)
    llm: Any = AutoModelForSeq2SeqLM.from_pretrained(models.llm).eval()
    ids = torch.randint(10, llm.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    fast = contestant.load(models, tmp_path, "cpu")
    for options in ({}, {"num_beams": 3}):
        found = [model.generate(ids, attention_mask=mask, max_new_tokens=12, **options) for model in (llm, fast)]
        assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_llama_cpp_generates_the_same_tokens(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    config = T5Config(
        vocab_size=200, d_model=64, d_kv=32, num_heads=2, d_ff=96, num_layers=3, num_decoder_layers=2,
        decoder_start_token_id=0, eos_token_id=None, initializer_factor=3.0, **options,
    )  # fmt: skip
    torch.manual_seed(3)  # llama.cpp's GELU is a table in float16: outputs of some random models differ
    llm = T5ForConditionalGeneration(config).eval()
    llm.save_pretrained(tmp_path)
    ids = torch.randint(10, 200, (4, 14), generator=torch.Generator().manual_seed(0))
    write_gguf(str(tmp_path), tmp_path / "f32.gguf", "F32")
    write_gguf(str(tmp_path), tmp_path / "q8.gguf", "Q8_0")
    expected = llm.generate(ids, max_new_tokens=20, do_sample=False)[:, 1:].tolist()
    assert len({token for row in expected for token in row}) > 3
    fast = LlamaCpp(tmp_path / "f32.gguf")
    assert fast(ids, 20, 1) == expected
    assert fast(ids[:1], 9, 1) == [expected[0][:9]]
    assert (tmp_path / "q8.gguf").stat().st_size < (tmp_path / "f32.gguf").stat().st_size / 2


def test_llama_cpp_continues_prompts_of_different_lengths(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    config = Gemma3TextConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=6, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    llm = Gemma3ForCausalLM(config).eval()
    llm.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "F32")
    prompts = [torch.randint(10, 200, (1, length)) for length in (14, 3, 9)]
    expected = [llm.generate(one, max_new_tokens=12, eos_token_id=None)[0, one.shape[1] :].tolist() for one in prompts]
    fast = LlamaCpp(tmp_path / "model.gguf")
    ids = [one[0].tolist() for one in prompts]
    assert fast.generate(ids, 12) == expected
    end = expected[1][4]
    assert fast.generate(ids, 12, end)[1] == expected[1][: expected[1].index(end) + 1]


@pytest.mark.parametrize("content", [None, b"", b"GGUF and no more"])
def test_llama_cpp_refuses_a_file_that_is_missing_or_cut(content: bytes | None, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="cannot load .*model.gguf. Remove it"):
        LlamaCpp(tmp_path / "model.gguf")


def test_llama_cpp_refuses_another_family(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = BartConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only T5 and Gemma 3 are converted"):
        write_gguf(str(tmp_path), tmp_path / "bart.gguf", "F32")


def test_cells_with_beams_leave_out_a_contestant_without(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(models: Any, folder: Path, device: str) -> Any:
        return lambda ids, new_tokens, num_beams: None

    found = {name: Contestant(load=load, model="llm", beams=name == "with") for name in ("with", "without")}
    for each in (module, benchmark):
        monkeypatch.setattr(each, "contestants", lambda: found)
    monkeypatch.setattr(benchmark.Benchmark, "_cost", lambda *arguments: {"load_seconds": 0.0, "peak_bytes": 0})
    cells = [Cell(prompt=4, output=2, beams=beams, preset="tiny", contestants=tuple(found)) for beams in (1, 2)]
    result = benchmark.Benchmark(cells, tmp_path / "result.json", measured[0]).run()
    assert [list(cell["results"]) for cell in result["cells"].values()] == [["with", "without"], ["with"]]
