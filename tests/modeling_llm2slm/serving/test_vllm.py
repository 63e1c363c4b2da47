"""The server gives the same outputs and probabilities with vLLM. `make test-vllm` runs this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.engine import LoadOptions, engine
from tests.support.common import apart
from tests.support.serving import serving


pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")


def check_server(path: str) -> None:
    from tests.modeling_llm2slm.engines.test_vllm import PROMPTS

    found: dict[str, Any] = {}
    sampled: dict[str, Any] = {"prompt": PROMPTS[:2], "max_tokens": 6, "n": 3, "temperature": 1.5, "seed": 5}
    for name in ("pytorch", "vllm"):
        with serving(engine(name).load(path, LoadOptions()), max_batch=8) as client:
            found[name] = client.post(prompt=PROMPTS[2], max_tokens=6, logprobs=3)[1]["choices"][0]
            outputs = [choice["text"] for choice in client.post(**sampled)[1]["choices"]]
            assert outputs == [choice["text"] for choice in client.post(**sampled)[1]["choices"]]
            assert len(set(outputs)) > 3
            assert outputs[3] == client.text(**{**sampled, "prompt": PROMPTS[1], "n": 1})
            assert client.text(prompt=[5, 6, 7], max_tokens=4, echo=True).startswith("src2 src3 src4out")
    expected, logprobs = found["pytorch"].pop("logprobs"), found["vllm"].pop("logprobs")
    assert found["vllm"] == found["pytorch"]
    assert logprobs["tokens"] == expected["tokens"]
    assert logprobs["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-3)
    for top, expected_top in zip(logprobs["top_logprobs"], expected["top_logprobs"], strict=True):
        assert top == pytest.approx(expected_top, abs=1e-3)


def test_samples_and_logprobs_are_those_of_the_engine(tmp_path: Path) -> None:
    from tests.modeling_llm2slm.engines.test_vllm import write_model

    apart(check_server, write_model("gpt2", tmp_path / "model"))
