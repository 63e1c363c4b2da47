"""The loop of exported models: the tokens, streams and stops of transformers' loop."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers.generation import GenerationMixin, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.support.common import PROMPTS, pad_prompts
from tests.support.exports import uncompiled_pair


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.append([])


class StopAfterSeven(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    pair = uncompiled_pair(tmp_path_factory.mktemp("decoding"), "t5", "replace")
    return pair.model, pair.exported


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_new_tokens": 1},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "min_new_tokens": 5},
        {"stopping_criteria": [StopAfterSeven()], "eos_token_id": None, "pad_token_id": 0},
        {"max_length": 9},
        {"num_beams": 4, "early_stopping": True},
        {"num_beams": 3, "length_penalty": -1.5, "num_return_sequences": 3, "max_new_tokens": 30},
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never", "repetition_penalty": 1.3},
        {"num_beams": 2, "stopping_criteria": [StopAfterSeven()]},
        {"num_beams": 2, "eos_token_id": None, "pad_token_id": 0},
        {"num_beams": 2, "eos_token_id": [1, 3, 5, 7]},
        {"num_beams": 2, "max_new_tokens": 1},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "defaults",
)
def test_tokens_are_those_of_the_stock_loop(models: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    batch = pad_prompts(PROMPTS)
    found = []
    for model in models:
        torch.manual_seed(0)
        found.append(
            model.generate(**batch, **({"max_new_tokens": 12} if "max_length" not in kwargs else {}) | kwargs)
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.3}])
def test_outputs_that_have_ended_leave_the_batch(
    models: tuple[Any, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pad_prompts(PROMPTS)
    plain = models[1].generate(**batch, max_new_tokens=12, eos_token_id=None)
    rows, forward = [], models[1].forward

    def count(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        rows.append(len(outputs.logits))
        return outputs

    monkeypatch.setattr(models[1], "forward", count)
    ends, found = plain[:-1, 4].tolist(), []  # each output but the last ends early
    for model in models:
        torch.manual_seed(0)
        found.append(model.generate(**batch, max_new_tokens=12, eos_token_id=ends, pad_token_id=0, **options))
    assert torch.equal(*found)
    assert rows[0] == len(PROMPTS)
    assert (rows[-1] == len(PROMPTS)) == bool(options)  # samples and processors depend on all rows


def test_a_cache_of_the_caller_keeps_its_rows(models: tuple[Any, Any]) -> None:
    batch, model = pad_prompts(PROMPTS), models[1]
    plain = model.generate(**batch, max_new_tokens=12, eos_token_id=None)
    cache = model.new_cache()
    options = {"past_key_values": cache, "eos_token_id": plain[:-1, 4].tolist(), "pad_token_id": 0}
    outputs = model.generate(**batch, max_new_tokens=8, **options)
    assert outputs.shape == (len(PROMPTS), 9)
    assert len(cache.prompt_mask) == len(PROMPTS)


def test_streams_are_those_of_the_stock_loop(models: tuple[Any, Any]) -> None:
    streams = []
    for model in models:
        streams.append(Kept())
        model.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=8, streamer=streams[-1])
    assert streams[0].pieces == streams[1].pieces
    assert len(streams[0].pieces) > 3


def test_what_the_loop_does_not_do_takes_the_stock_loop(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[bool] = []
    stock = GenerationMixin._sample
    monkeypatch.setattr(
        GenerationMixin, "_sample", lambda *args, **kwargs: calls.append(True) or stock(*args, **kwargs)
    )
    batch = pad_prompts(PROMPTS)
    plain = models[1].generate(**batch, max_new_tokens=8)
    assert not calls
    with caplog.at_level(logging.INFO, logger="modeling_llm2slm.engines.decoding"):
        outputs = models[1].generate(**batch, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    assert calls == [True]
    assert torch.equal(outputs.sequences, plain)
    assert "takes the loop of transformers" in caplog.text


def test_beams_that_are_sampled_take_the_stock_loop(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch, found = pad_prompts(PROMPTS), []
    with caplog.at_level(logging.INFO, logger="modeling_llm2slm.engines.decoding"):
        for model in models:
            torch.manual_seed(0)
            found.append(model.generate(**batch, num_beams=2, do_sample=True, max_new_tokens=8))
    assert torch.equal(*found)
    assert "`do_sample` takes the loop of transformers" in caplog.text
    monkeypatch.setattr(GenerationMixin, "_beam_search", None)
    models[1].generate(**batch, num_beams=2, max_new_tokens=8)
