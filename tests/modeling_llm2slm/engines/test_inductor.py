"""AOTInductor: the tokens of PyTorch from buffers that steps write to. Fast tests run the graphs before compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_llm2slm import ExportedLLM2SLM
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.engines import inductor
from modeling_llm2slm.engines.inductor import InductorGraph
from modeling_llm2slm.inference.engine import engine
from tests.support import families
from tests.support.common import PROMPTS, pad_prompts
from tests.support.exports import (
    KINDS,
    Pair,
    check_continuation,
    check_strategies,
    check_threads,
    checkpoint,
    learned,
    needs,
    uncompiled_pair,
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[0])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, and its export with graphs that are not compiled."""
    return uncompiled_pair(tmp_path_factory.mktemp("inductor"), *request.param)


def test_strategies_give_the_tokens_of_pytorch(pair: Pair) -> None:
    check_strategies(pair)


def test_outputs_continue_from_a_cache(pair: Pair) -> None:
    check_continuation(pair)


def test_threads_get_their_own_outputs(pair: Pair) -> None:
    check_threads(pair)


def test_outputs_outgrow_the_buffers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "CAPACITY", 4)
    expected, found = pair.outputs(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=14, min_new_tokens=14)
    assert torch.equal(expected, found)


def test_openvino_reads_prompts_in_int8(tmp_path: Path) -> None:
    needs("openvino")
    from modeling_llm2slm.engines.openvino import OpenVINOGraph

    pair = uncompiled_pair(tmp_path, "t5", "replace", weights="int8")
    graphs = pair.exported.graphs
    assert isinstance(graphs["prompt"], OpenVINOGraph)
    assert isinstance(graphs["step"], InductorGraph)
    for options in ({}, {"num_beams": 3}):  # a model that knows its outputs by heart keeps them in int8
        assert torch.equal(*pair.outputs(**pad_prompts(PROMPTS), **options))
    assert (tmp_path / "fast" / "openvino_prompt.xml").is_file()
    assert engine("inductor").quantizers("int8") == ("openvino", "nncf")
    assert engine("inductor").quantizers("fp32") == ()


def test_a_decoder_only_model_has_no_prompt_to_read_in_int8(tmp_path: Path) -> None:
    needs("openvino")
    families.build_slm("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"quantizes the LLM of an LLM-to-SLM model only"):
        export(tmp_path / "gpt2", tmp_path / "fast", engine="inductor", weights="int8")


def test_a_missing_compiler_is_named() -> None:
    from torch._inductor import config

    # `monkeypatch` would leave the setting deleted, for all tests that follow.
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ImportError, match=r"needs a C\+\+ compiler"):
        engine("inductor").check_export("fp32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
def test_compiled_graphs_give_the_tokens_of_pytorch(kind: tuple[str, str], tmp_path: Path) -> None:
    export(checkpoint(*kind, tmp_path / "source"), tmp_path / "fast", engine="inductor")
    compiled = Pair(learned(*kind), ExportedLLM2SLM.from_pretrained(tmp_path / "fast"))
    check_strategies(compiled)
    check_continuation(compiled)
    check_threads(compiled)
    (tmp_path / "fast" / "step.pt2").write_bytes(b"no archive")
    with pytest.raises(OSError, match="damaged"):
        ExportedLLM2SLM.from_pretrained(tmp_path / "fast")
