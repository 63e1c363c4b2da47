"""The profile of a step: every operation is counted, and matrix products read the weights."""

from __future__ import annotations

import pytest
from transformers import GPT2Config

from benchmarks.step_profile import profile


def test_profile_of_a_tiny_slm(tmp_path):
    pytest.importorskip("openvino")
    special = {"bos_token_id": 0, "eos_token_id": 0}
    found = profile(tmp_path, "fp32", GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, **special))
    products = found["operations"]["FullyConnected"]
    # Of each block: attention in and out, MLP up and down; and the head. Some may take less than a microsecond.
    assert 1 <= products["nodes"] <= 2 * 4 + 1
    assert 0 < products["ms"] < found["ms_per_token_while_profiled"]
    assert found["weights_bytes"] > 4 * 500 * 64
    assert found["matrix_products_gb_per_second"] > 0
