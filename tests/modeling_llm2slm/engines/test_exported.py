"""Exported models generate the tokens of PyTorch with transformers' `generate()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.support.common import END, PROMPTS, pad_prompts, strip_padding
from tests.support.exports import (
    KINDS,
    Pair,
    check_continuation,
    check_strategies,
    check_threads,
    pair_of,
)


SLOW_KINDS = (("gpt2", "add"), ("llama", "add"), ("gemma3", "add"), ("opt_projected", "replace"), ("bart", "add"))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[0])
def pair(request, tmp_path_factory) -> Pair:
    return pair_of(tmp_path_factory, *request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Pair:
    return pair_of(tmp_path_factory, *KINDS[0])


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Pair:
    return pair_of(tmp_path_factory, *KINDS[1])


def test_all_strategies_give_the_tokens_of_pytorch(pair) -> None:
    check_strategies(pair)


@pytest.mark.slow
@pytest.mark.parametrize(("slm", "fusion"), SLOW_KINDS)
def test_other_families(tmp_path_factory, slm, fusion) -> None:
    check_strategies(pair_of(tmp_path_factory, slm, fusion))


def test_a_prompt_alone_and_in_a_batch_and_without_a_mask(pair) -> None:
    together = strip_padding(pair.outputs(**pad_prompts(PROMPTS, "left", extra=1))[1])
    for prompt, output in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([prompt])
        alone = pair.exported.generate(input_ids=ids, max_new_tokens=12)
        assert strip_padding(alone) == [output]
    inferred = pair.exported.generate(input_ids=pad_prompts(PROMPTS)["input_ids"], max_new_tokens=12)
    assert strip_padding(inferred) == together


def test_scores_are_those_of_pytorch(pair) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    expected, found = pair.outputs(**pad_prompts(PROMPTS), **wanted)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


def test_prompt_states_are_those_of_pytorch_and_can_be_reused(pair) -> None:
    batch = pad_prompts(PROMPTS, "left", extra=1)
    states, expected = pair.exported.encode_prompt(**batch), pair.model.encode_prompt(**batch)
    assert torch.equal(states.attention_mask, expected.attention_mask)
    kept = states.attention_mask.bool()
    torch.testing.assert_close(states.last_hidden_state[kept], expected.last_hidden_state[kept], rtol=1e-4, atol=1e-4)
    before = states.last_hidden_state.clone()
    direct = pair.outputs(**batch, num_beams=2)[1]
    for _ in range(2):
        assert torch.equal(pair.exported.generate(encoder_outputs=states, num_beams=2, max_new_tokens=12), direct)
    assert torch.equal(states.last_hidden_state, before)


class Collector:
    """A streamer that collects tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_gets_each_token(pair) -> None:
    streamer = Collector()
    output = pair.exported.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=8, streamer=streamer)
    assert streamer.tokens == [*output[0].tolist(), -1]


def test_an_output_continues_from_its_cache(pair) -> None:
    check_continuation(pair)


def test_threads_get_their_own_outputs(pair) -> None:
    check_threads(pair)


def test_a_decoder_prefix_is_continued(pair) -> None:
    whole = pair.outputs(**pad_prompts(PROMPTS), max_new_tokens=8)[1]
    expected, found = pair.outputs(**pad_prompts(PROMPTS), decoder_input_ids=whole[:, :4], num_beams=2)
    assert torch.equal(expected, found)


def rows_read(graph: Any, monkeypatch: Any) -> list[int]:
    """Return a list that fills with the number of rows of every run of a graph's states."""
    rows: list[int] = []
    new_state = graph.new_state

    def counted() -> Any:
        state = new_state()
        run = state.run

        def note(inputs: dict[str, torch.Tensor], order: Any) -> Any:
            rows.append(len(inputs["inputs_embeds"]))
            return run(inputs, order)

        state.run = note
        return state

    monkeypatch.setattr(graph, "new_state", counted)
    return rows


def test_beams_read_their_prompt_once(pair, monkeypatch) -> None:
    rows = rows_read(pair.exported.graphs["step"], monkeypatch)
    pair.exported.generate(**pad_prompts(PROMPTS), num_beams=4, max_new_tokens=3)
    assert rows == [3, 12, 12]


def test_an_encoder_decoder_slm_projects_its_prompt_once(t5, monkeypatch) -> None:
    runs: list[int] = []
    graph = t5.exported.graphs["cross"]
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda inputs: runs.append(len(inputs["last_hidden_state"])) or run(inputs))
    t5.exported.generate(**pad_prompts(PROMPTS), num_beams=4, max_new_tokens=6)
    assert runs == [3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "supports no assisted generation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "does not return attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "does not return hidden states"),
        ({"cache_implementation": "static"}, "the engine holds keys and values"),
        ({"use_cache": False}, "`use_cache=False` is not supported"),
        ({"decoder_attention_mask": torch.tensor([[1, 0]])}, "all outputs of a batch have one length"),
        ({"guidance_scale": 2.0}, "`guidance_scale` is not supported"),
        ({"max_new_tokens": 100}, "positions"),
    ],
)
def test_unsupported_arguments_are_refused(gpt2, kwargs, message) -> None:
    if "decoder_attention_mask" in kwargs:
        kwargs = {**kwargs, "decoder_input_ids": torch.tensor([[END, 3]])}
    with pytest.raises(ValueError, match=message):
        gpt2.exported.generate(input_ids=torch.tensor(PROMPTS[:1]), **{"max_new_tokens": 4, **kwargs})


def test_assisted_generation_is_refused_on_both_sides(gpt2) -> None:
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(ValueError, match="supports no assisted generation"):
        gpt2.exported.generate(input_ids=ids, assistant_model=gpt2.model, max_new_tokens=4)
    with pytest.raises(ValueError, match="is_assistant"):
        gpt2.exported.generate(ids, generation_config=GenerationConfig(is_assistant=True, max_new_tokens=4))
    with pytest.raises(ValueError, match="cannot be cropped"):
        gpt2.exported.new_cache().crop(-1)


def test_prompts_are_checked_before_any_compute(gpt2, monkeypatch) -> None:
    def fail(inputs: Any) -> None:
        raise AssertionError("the graph ran")

    monkeypatch.setattr(gpt2.exported.graphs["prompt"], "run", fail)
    with pytest.raises(ValueError, match="positions"):
        gpt2.exported.generate(input_ids=torch.full((1, 70), 3), max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt is empty"):
        gpt2.exported.encode_prompt(torch.tensor([[3, 4]]), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="has shape"):
        gpt2.exported.generate(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 3), max_new_tokens=4)


def test_a_cache_of_another_model_is_refused(gpt2) -> None:
    other = gpt2.model.generate(
        input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=2, return_dict_in_generate=True
    ).past_key_values
    with pytest.raises(ValueError, match="belongs to another model"):
        gpt2.exported.generate(input_ids=torch.tensor(PROMPTS[:1]), past_key_values=other, max_new_tokens=4)
