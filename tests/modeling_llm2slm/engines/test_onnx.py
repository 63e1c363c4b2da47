"""ONNX Runtime: the tokens of PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_llm2slm import ExportedLLM2SLM
from modeling_llm2slm.conversion.export import export
from tests.support.common import PROMPTS, pad_prompts
from tests.support.exports import (
    KINDS,
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


CACHE = ("gemma3", "cache")  # with sliding windows


@pytest.mark.slow
@pytest.mark.parametrize(("slm", "fusion"), [*KINDS, CACHE])
def test_onnxruntime_gives_the_tokens_of_pytorch(tmp_path_factory, slm, fusion) -> None:
    pair = pair_of(tmp_path_factory, slm, fusion, "onnx")
    check_strategies(pair)
    assert pair.exported.details["engine"] == "onnx"
    for graph in pair.exported.graphs.values():
        assert graph.runner.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    check_continuation(pair)
    check_threads(pair)
    check_prompt_lengths(pair)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("slm", "fusion"), [*KINDS, CACHE])
def test_steps_have_weights_in_blocks(tmp_path: Path, slm: str, fusion: str, weights: str) -> None:
    needs("onnx")
    import onnx

    export(checkpoint(slm, fusion, tmp_path / "model"), tmp_path / "fast", engine="onnx", weights=weights)
    pair = Pair(learned(slm, fusion), ExportedLLM2SLM.from_pretrained(tmp_path / "fast"))
    if weights == "int8":  # a model that knows its outputs by heart keeps them
        assert torch.equal(*pair.outputs(**pad_prompts(PROMPTS)))
    bits = {"prompt": set(), "step": set()}
    for name, found in bits.items():
        for node in onnx.load(str(tmp_path / "fast" / f"{name}.onnx")).graph.node:
            assert node.op_type != "Gemm"
            if node.op_type == "MatMulNBits":
                found |= {attribute.i for attribute in node.attribute if attribute.name == "bits"}
    # In int4, the output layer keeps 8 bits; so do prompts, whose activations have outliers in a decoder-only LLM.
    assert bits["step"] == ({8} if weights == "int8" else {4, 8})
    assert bits["prompt"] == ({8} if fusion == "cache" else set())
