"""ONNX Runtime: the tokens of PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.support.exports import KINDS, check_continuation, check_strategies, check_threads, pair_of


@pytest.mark.slow
@pytest.mark.parametrize(("slm", "fusion"), KINDS)
def test_onnxruntime_gives_the_tokens_of_pytorch(tmp_path_factory, slm, fusion) -> None:
    pair = pair_of(tmp_path_factory, slm, fusion, "onnx")
    check_strategies(pair)
    assert pair.exported.details["engine"] == "onnx"
    for graph in pair.exported.graphs.values():
        assert graph.runner.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    check_continuation(pair)
    check_threads(pair)
