"""Stock `generate()`: each strategy gives the outputs of the plain sub-models, whatever padding and cache."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import ModuleList
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import modeling_llm2slm.generation_llm2slm as generation
import modeling_llm2slm.modeling_llm2slm as modeling
from modeling_llm2slm import LLM2SLMForConditionalGeneration
from tests.support.common import (
    END,
    FUSIONS,
    PAD,
    PROMPTS,
    SLM_VOCAB_SIZE,
    Parts,
    build_model,
    build_parts,
    check_outputs_vary,
    count_calls,
    pad_prompts,
    pairwise,
    reference_beams,
    reference_greedy,
    reference_logits,
    reference_prompt,
    reference_sample,
    shared_family,
    shared_parts,
    slm_tokenizer,
    stock_slm_generate,
    strip_padding,
    t5_config,
)


LENGTH = 12  # new tokens
SEED = 7
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # of float32 logits with a standard deviation of about 10

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 4, "do_sample": False},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "return_samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "return_beams": {"num_beams": 4, "do_sample": False, "num_return_sequences": 3},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
# How the prompts of a batch are laid out; "alone" is one prompt without padding.
PADDINGS = ["alone", "left", "right"]


def prompts_of(padding: str) -> list[list[int]]:
    return PROMPTS[:1] if padding == "alone" else PROMPTS


def generate(parts: Parts, padding: str = "alone", passed: bool = False, **kwargs: Any) -> Any:
    """`generate()` of the composite with logits, from ids or from states computed before."""
    batch = pad_prompts(prompts_of(padding), side=padding)
    if passed:
        states = parts.model.encode_prompt(**batch)
        batch = {"encoder_outputs": states, "attention_mask": batch["attention_mask"]}
    torch.manual_seed(SEED)
    kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True} | kwargs
    return parts.model.generate(**batch, **kwargs)


def check_parity(parts: Parts, strategy: str, cache: str, padding: str, passed: bool = False) -> None:
    """The composite's tokens and logits are those of stock generation by the bare SLM from prompts read alone."""
    kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True} | STRATEGIES[strategy]
    torch.manual_seed(SEED)
    expected = stock_slm_generate(parts, prompts_of(padding), **kwargs)
    actual = generate(parts, padding, passed, **STRATEGIES[strategy], **CACHES[cache])
    assert actual.sequences[:, 1:].tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), **TOLERANCE)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_outputs_vary_and_differ_between_prompts(fusion: str) -> None:
    """Without this, equality below would prove nothing."""
    check_outputs_vary([reference_greedy(shared_parts(fusion), prompt, LENGTH)[0] for prompt in PROMPTS])


@pytest.mark.parametrize("passed", [False, True], ids=["computed", "passed"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parity(strategy: str, cache: str, padding: str, passed: bool) -> None:
    check_parity(shared_parts("add"), strategy, cache, padding, passed)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fusion", [fusion for fusion in FUSIONS if fusion != "add"])
def test_parity_of_other_fusions(fusion: str, strategy: str) -> None:
    """What makes P does not see cache and padding: pairs of them."""
    for padding, cache, passed in pairwise(list(STRATEGIES).index(strategy), PADDINGS, list(CACHES)):
        check_parity(shared_parts(fusion), strategy, cache, padding, passed)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_greedy_equals_the_slow_reference(fusion: str, padding: str) -> None:
    parts = shared_parts(fusion)
    output = generate(parts, padding, do_sample=False)
    for row, prompt in enumerate(prompts_of(padding)):
        sequence, logits = reference_greedy(parts, prompt, LENGTH)
        assert strip_padding(output.sequences)[row] == sequence
        torch.testing.assert_close(torch.stack(output.logits)[: len(sequence), row], logits, **TOLERANCE)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_sampling_equals_the_slow_reference(fusion: str, padding: str) -> None:
    parts = shared_parts(fusion)
    output = generate(parts, padding, do_sample=True, top_k=0)
    assert output.sequences[:, 1:].tolist() == reference_sample(parts, prompts_of(padding), LENGTH, SEED)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_beams_equal_the_slow_reference(fusion: str, padding: str) -> None:
    parts, beams, length = shared_parts(fusion), 3, 8
    output = generate(
        parts,
        padding,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        min_new_tokens=length,
        max_new_tokens=length,
    )
    expected = [reference_beams(parts, prompt, length, beams) for prompt in prompts_of(padding)]
    assert output.sequences[:, 1:].tolist() == list(itertools.chain(*expected))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_rows_that_end_early_do_not_change_the_others(fusion: str, padding: str, cache: str) -> None:
    parts = shared_parts(fusion)
    sequences = [reference_greedy(parts, prompt, LENGTH)[0] for prompt in PROMPTS]
    ends = [END, sequences[1][4]]
    output = generate(parts, padding, do_sample=False, eos_token_id=ends, **CACHES[cache]).sequences[:, 1:].tolist()
    for row, sequence in zip(output, sequences, strict=True):
        length = min(sequence.index(end) + 1 if end in sequence else LENGTH for end in ends)
        assert row[:length] == sequence[:length]
        assert set(row[length:]) <= {END}
    assert END in output[1][4:]


@pytest.mark.parametrize("passed", [False, True], ids=["computed", "passed"])
@pytest.mark.parametrize("side", ["alone", "left", "right"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_prompt_lookup(fusion: str, side: str, passed: bool) -> None:
    """Stock prompt lookup takes one prompt and a dynamic cache, and gives the greedy output."""
    parts, length = shared_parts(fusion), 30
    expected, logits = reference_greedy(parts, PROMPTS[0], length)
    batch = pad_prompts(PROMPTS[:1], side, extra=0 if side == "alone" else 4)
    if passed:
        batch = {"encoder_outputs": parts.model.encode_prompt(**batch)}
    with count_widths(parts) as widths:
        output = parts.model.generate(
            **batch,
            max_new_tokens=length,
            prompt_lookup_num_tokens=3,
            max_matching_ngram_size=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert output.sequences[0, 1:].tolist() == expected
    torch.testing.assert_close(torch.cat(output.logits), logits, **TOLERANCE)
    assert max(widths[1:]) > 1, "no candidate was ever looked up"


@contextmanager
def count_widths(parts: Parts) -> Iterator[list[int]]:
    """Number of output tokens that each call of the composite gets."""
    widths: list[int] = []
    handle = parts.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["decoder_input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield widths
    finally:
        handle.remove()


def test_composite_as_assistant() -> None:
    """With the prompt counted in the cache, stock assisted generation would crop it wrongly or raise."""
    parts, assistant = shared_parts("add"), shared_parts("replace").model
    for helper in (assistant, copy.deepcopy(parts.model)):
        output = generate(parts, assistant_model=helper, do_sample=False)
        assert strip_padding(output.sequences)[0] == reference_greedy(parts, PROMPTS[0], LENGTH)[0]


# The parity checks can fail: each planted fault is found.


def plant_dropped_prompt_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LLM and the SLM attend to padding."""
    original = modeling.LLM2SLMEncoder.prompt_mask
    monkeypatch.setattr(
        modeling.LLM2SLMEncoder, "prompt_mask", lambda self, *a, **k: torch.ones_like(original(self, *a, **k))
    )


def plant_dropped_slm_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling.mask_and_positions

    def faulty(*args: Any, **kwargs: Any) -> Any:
        mask, positions = original(*args, **kwargs)
        return torch.ones_like(mask), positions

    for module in (modeling, generation):
        monkeypatch.setattr(module, "mask_and_positions", faulty)


def plant_positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of tokens after the first step are too high by one."""
    original = modeling.mask_and_positions

    def faulty(prompt_mask: Any, output_mask: Any, output_length: int, cache: Any) -> Any:
        mask, positions = original(prompt_mask, output_mask, output_length, cache)
        return mask, positions + int(cache is not None and cache.prompt_length > 0)

    for module in (modeling, generation):
        monkeypatch.setattr(module, "mask_and_positions", faulty)


def plant_states_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling.LLM2SLMEncoder.forward

    @functools.wraps(original)  # stock generation reads the signature
    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = original(self, *args, **kwargs)
        states.last_hidden_state = states.last_hidden_state.roll(1, dims=0)
        return states

    monkeypatch.setattr(modeling.LLM2SLMEncoder, "forward", faulty)


def plant_misordered_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation.LLM2SLMCache, "reorder_cache", lambda self, beam_idx: None)


@pytest.mark.parametrize(
    ("plant", "strategy", "padding"),
    [
        (plant_dropped_prompt_mask, "greedy", "right"),
        (plant_dropped_prompt_mask, "beam", "left"),
        (plant_dropped_slm_mask, "greedy", "right"),
        (plant_positions_off_by_one, "greedy", "alone"),
        (plant_positions_off_by_one, "sampling", "left"),
        (plant_states_of_another_row, "greedy", "left"),
        (plant_states_of_another_row, "return_beams", "right"),
        (plant_misordered_cache, "beam", "alone"),
        (plant_misordered_cache, "beam_sampling", "right"),
    ],
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_planted_fault_breaks_parity(
    plant: Any, strategy: str, padding: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = shared_parts("add")
    check_parity(parts, strategy, cache, padding)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_parity(parts, strategy, cache, padding)


# The prompt: once through the LLM, its mask, its length.


@pytest.mark.parametrize(
    "kwargs",
    [*STRATEGIES.values(), {"prompt_lookup_num_tokens": 3}, *CACHES.values()],
    ids=[*STRATEGIES, "prompt_lookup", *CACHES],
)
def test_the_llm_runs_once_per_generate(kwargs: dict[str, Any]) -> None:
    parts = shared_parts("add")
    padding = "alone" if "prompt_lookup_num_tokens" in kwargs else "right"
    with count_calls(parts.model.encoder.llm) as calls:
        generate(parts, padding, **kwargs)
    assert len(calls) == 1


@pytest.mark.parametrize("slm", ["gpt2", "t5"])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("greedy", "sampling")])
def test_the_slm_reads_a_prompt_once_for_all_its_beams(slm: str, strategy: str) -> None:
    parts = shared_family(slm)
    kwargs = STRATEGIES[strategy]
    beams = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    rows = []
    blocks = next(module for module in parts.model.decoder.get_decoder().modules() if isinstance(module, ModuleList))
    handle = blocks[0].register_forward_hook(lambda module, args, output: rows.append(len(args[0])), always_call=True)
    with handle:
        generate(parts, "right", min_new_tokens=3, **kwargs)
    assert rows[0] == len(PROMPTS)
    assert set(rows[1:]) == {beams * len(PROMPTS)}


@pytest.mark.parametrize("kwargs", [*STRATEGIES.values(), {"prompt_lookup_num_tokens": 3}])
def test_the_llm_does_not_run_if_encoder_outputs_are_given(kwargs: dict[str, Any]) -> None:
    parts = shared_parts("add")
    padding = "alone" if "prompt_lookup_num_tokens" in kwargs else "right"
    batch = pad_prompts(prompts_of(padding), side=padding)
    states = parts.model.encode_prompt(**batch)
    with count_calls(parts.model.encoder.llm) as calls:
        parts.model.generate(
            encoder_outputs=states, attention_mask=batch["attention_mask"], max_new_tokens=4, **kwargs
        )
        parts.model.generate(encoder_outputs=states, max_new_tokens=4, **kwargs)
    assert not calls


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_encoder_outputs_are_never_changed(strategy: str) -> None:
    """Stock beam search expands the states it is given in place."""
    parts = shared_parts("add")
    batch = pad_prompts(PROMPTS)
    states = parts.model.encode_prompt(**batch)
    before = {name: (tensor, tensor.clone()) for name, tensor in states.items()}
    sequences = []
    for _ in range(2):
        torch.manual_seed(SEED)
        sequences.append(
            parts.model.generate(encoder_outputs=states, max_new_tokens=LENGTH, **STRATEGIES[strategy]).tolist()
        )
    assert sequences[0] == sequences[1]
    assert states.keys() == before.keys()
    for name, (tensor, copied) in before.items():
        assert states[name] is tensor
        assert torch.equal(tensor, copied)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_an_omitted_mask_is_inferred_from_the_llms_pad_id(strategy: str, side: str) -> None:
    parts = shared_parts("add")
    input_ids = pad_prompts(PROMPTS, side)["input_ids"]
    sequences = parts.model.generate(input_ids, max_new_tokens=LENGTH, **STRATEGIES[strategy])
    assert sequences.tolist() == generate(parts, side, **STRATEGIES[strategy]).sequences.tolist()


def test_padding_comes_from_the_mask_and_not_from_ids() -> None:
    """A pad id inside a prompt is a token if the mask says so, and any id is padding if it says that."""
    parts = shared_parts("add")
    prompts = [[11, PAD, 7, 93], [85, 29, 1, PAD, 40, 6]]
    batch = pad_prompts(prompts)
    batch["input_ids"][0, 4:] = 33
    sequences = parts.model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    assert strip_padding(sequences) == [reference_greedy(parts, prompt, LENGTH)[0] for prompt in prompts]


def test_a_mask_of_another_prompt_than_the_states_is_an_error() -> None:
    parts = shared_parts("add")
    batch = pad_prompts(PROMPTS)
    states = parts.model.encode_prompt(**batch)
    for mask in (
        batch["attention_mask"].flip(0),
        torch.ones_like(batch["attention_mask"]),
        batch["attention_mask"][:, 1:],
    ):
        with pytest.raises(ValueError, match="attention_mask"):
            parts.model.generate(encoder_outputs=states, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("way", ["keyword", "positional", "inputs", "no_mask", "positional_no_mask"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kwargs", [{"max_new_tokens": 60}, {"max_length": 61}], ids=lambda kwargs: next(iter(kwargs)))
def test_too_long_is_an_error_before_any_compute(kwargs: dict[str, int], cache: str, way: str) -> None:
    model = shared_parts("add").model
    batch = pad_prompts(PROMPTS)
    ids = batch.pop("input_ids")
    if way.endswith("no_mask"):
        batch = {}
    args = (ids,) if way.startswith("positional") else ()
    if not args:
        batch["inputs" if way == "inputs" else "input_ids"] = ids
    with (
        count_calls(model.encoder.llm) as llm_calls,
        count_calls(model.decoder) as slm_calls,
        pytest.raises(ValueError, match=r"prompt has 12 tokens.* 60.* 64 positions.*max_new_tokens"),
    ):
        model.generate(*args, **batch, **kwargs, **CACHES[cache])
    assert not llm_calls
    assert not slm_calls


def test_too_long_is_an_error_if_encoder_outputs_are_given() -> None:
    model = shared_parts("add").model
    states = model.encode_prompt(**pad_prompts(PROMPTS))
    with count_calls(model.decoder) as calls, pytest.raises(ValueError, match="64 positions"):
        model.generate(encoder_outputs=states, max_new_tokens=60)
    assert not calls


def test_padding_takes_no_positions() -> None:
    """The longest output that fits is generated, also if padding makes the batch wider than the SLM's positions."""
    parts = shared_parts("add")
    batch = pad_prompts(PROMPTS, extra=60)
    longest = 64 - 12
    sequences = parts.model.generate(
        **batch, max_new_tokens=longest, min_new_tokens=longest, do_sample=False, return_dict_in_generate=True
    )
    assert sequences.sequences.shape == (3, longest + 1)
    expected = stock_slm_generate(parts, PROMPTS, max_new_tokens=longest, min_new_tokens=longest, do_sample=False)
    assert sequences.sequences[:, 1:].tolist() == expected.tolist()


def test_a_prompt_longer_than_the_slm_is_an_error() -> None:
    model = shared_parts("add").model
    with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match="70 tokens.* 64 positions"):
        model.encode_prompt(torch.full((1, 70), 5))
    assert not calls


def test_an_empty_prompt_is_an_error() -> None:
    model = shared_parts("add").model
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.tensor([[5, 6], [PAD, PAD]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=2)


def test_an_llm_without_pad_id() -> None:
    """No mask is inferred: one prompt is taken whole, more need a mask."""
    parts = build_parts("add")
    parts.model.config.encoder.pad_token_id = None
    prompt = [11, PAD, 52, 7]
    alone = parts.model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False)
    assert strip_padding(alone)[0] == reference_greedy(parts, prompt, LENGTH)[0]
    batch = pad_prompts(PROMPTS)
    with pytest.raises(ValueError, match="attention_mask"):
        parts.model.generate(batch["input_ids"], max_new_tokens=2)
    sequences = parts.model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    assert strip_padding(sequences) == [reference_greedy(parts, prompt, LENGTH)[0] for prompt in PROMPTS]


# What goes in and comes out of the loop.


class Forbid(LogitsProcessor):
    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_logits_processors(strategy: str) -> None:
    """They see outputs only, and tokens they forbid are never generated."""
    parts = shared_parts("add")
    forbidden = sorted(set(reference_greedy(parts, PROMPTS[0], LENGTH)[0]))
    processor = Forbid(forbidden)
    kwargs = {"logits_processor": LogitsProcessorList([processor]), **STRATEGIES[strategy]}
    sequences = generate(parts, "right", **kwargs).sequences[:, 1:]
    assert not set(sequences.flatten().tolist()) & set(forbidden) - {END}
    assert processor.lengths == list(range(1, len(processor.lengths) + 1))
    expected = stock_slm_generate(
        parts,
        PROMPTS,
        max_new_tokens=LENGTH,
        logits_processor=LogitsProcessorList([Forbid(forbidden)]),
        **STRATEGIES[strategy],
    )
    assert sequences.tolist() == expected.tolist()


class StopOn(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_stopping_criteria() -> None:
    parts = shared_parts("add")
    sequence = reference_greedy(parts, PROMPTS[0], LENGTH)[0]
    stop = StoppingCriteriaList([StopOn(sequence[3])])
    output = generate(parts, do_sample=False, stopping_criteria=stop).sequences[0, 1:].tolist()
    assert output == sequence[: sequence.index(sequence[3]) + 1]
    output = generate(parts, do_sample=False, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(6)]))
    assert output.sequences[0, 1:].tolist() == sequence[:5]


@pytest.mark.parametrize("kwargs", [{"max_length": 8}, {"max_new_tokens": 7}], ids=["max_length", "max_new_tokens"])
def test_lengths_count_output_tokens(kwargs: dict[str, int]) -> None:
    parts = shared_parts("add")
    sequences = parts.model.generate(**pad_prompts(PROMPTS), **kwargs, min_new_tokens=7, do_sample=False)
    assert sequences.shape == (3, 8)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token() -> None:
    parts = shared_parts("add")
    streamer = Collect()
    sequences = generate(parts, do_sample=False, streamer=streamer).sequences
    assert streamer.pieces == [[token] for token in sequences[0].tolist()]
    assert streamer.ended


def test_text_iterator_streamer() -> None:
    parts, tokenizer = shared_parts("add"), slm_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    thread = threading.Thread(
        target=parts.model.generate,
        kwargs={**pad_prompts(PROMPTS[:1]), "streamer": streamer, "max_new_tokens": LENGTH, "do_sample": False},
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(reference_greedy(parts, PROMPTS[0], LENGTH)[0], skip_special_tokens=True)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_lengths_of_what_is_returned(strategy: str, cache: str) -> None:
    """Hidden states cover output positions; attentions N + output so far, or a static cache's whole length."""
    model = build_model("add")
    model.set_attn_implementation("eager")
    batch, steps = pad_prompts(PROMPTS), 5
    rows = len(PROMPTS) * STRATEGIES[strategy].get("num_beams", 1)
    prompt_length, config = batch["input_ids"].shape[1], model.config
    output = model.generate(
        **batch,
        max_new_tokens=steps,
        min_new_tokens=steps,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        **STRATEGIES[strategy],
        **CACHES[cache],
    )
    assert len(output.scores) == len(output.logits) == steps
    assert all(scores.shape == (rows, SLM_VOCAB_SIZE) for scores in output.scores)
    assert len(output.decoder_hidden_states) == len(output.decoder_attentions) == steps
    for step, (states, attentions) in enumerate(
        zip(output.decoder_hidden_states, output.decoder_attentions, strict=True)
    ):
        new = step + 1 if cache == "none" else 1
        seen = prompt_length + (steps if cache == "static" else step + 1)
        assert len(states) == config.decoder.n_layer + 1
        assert len(attentions) == config.decoder.n_layer
        assert {tuple(layer.shape) for layer in states} == {(rows, new, config.decoder.n_embd)}
        assert {tuple(layer.shape) for layer in attentions} == {(rows, config.decoder.n_head, new, seen)}
    assert not output.cross_attentions or output.cross_attentions[0] is None
    assert len(output.encoder_hidden_states) == config.encoder.num_layers + 1
    assert len(output.encoder_attentions) == config.encoder.num_layers
    assert {tuple(layer.shape[-2:]) for layer in output.encoder_attentions} == {(prompt_length, prompt_length)}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_decoder_input_ids_force_the_start_of_the_output(strategy: str, padding: str, cache: str) -> None:
    parts, forced = shared_parts("add"), [42, 17, 63]
    rows = len(prompts_of(padding))
    begin = torch.tensor([[END, *forced]] * rows)
    output = generate(
        parts, padding, decoder_input_ids=begin, **STRATEGIES[strategy], **CACHES[cache], max_new_tokens=6
    )
    assert output.sequences[:, :4].tolist() == begin.tolist()
    if strategy == "beam":
        return
    for row, prompt in enumerate(prompts_of(padding)):
        sequence = output.sequences[row, 1:].tolist()
        logits = reference_logits(parts, prompt, sequence)[len(forced) : -1]
        assert sequence[len(forced) :] == logits.argmax(-1).tolist()


def test_a_forced_start_without_the_start_token_gets_it() -> None:
    """As in every seq2seq model of transformers."""
    parts = shared_parts("add")
    output = parts.model.generate(
        **pad_prompts(PROMPTS[:1]), decoder_input_ids=torch.tensor([[42]]), max_new_tokens=3, do_sample=False
    )
    assert output[0, :2].tolist() == [END, 42]


@pytest.mark.parametrize("mask", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("passed", [False, True], ids=["computed", "passed"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_an_output_is_continued_from_its_cache(padding: str, passed: bool, mask: bool) -> None:
    """Half the output, then the rest from the returned cache, give the whole output."""
    parts = shared_parts("add")
    whole = generate(parts, padding, do_sample=False).sequences
    first = generate(parts, padding, passed, do_sample=False, max_new_tokens=5)
    assert first.past_key_values.get_seq_length() == 5  # start and four tokens: the fifth was not read yet
    kwargs = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
    if mask:
        kwargs["decoder_attention_mask"] = torch.ones_like(first.sequences)
    with count_widths(parts) as widths:
        second = generate(parts, padding, passed, do_sample=False, max_new_tokens=LENGTH - 5, **kwargs)
    assert second.sequences.tolist() == whole.tolist()
    assert widths == [1] * (LENGTH - 5)
    torch.testing.assert_close(
        torch.stack(second.logits), torch.stack(generate(parts, padding, do_sample=False).logits[5:]), **TOLERANCE
    )


def test_an_output_is_continued_with_more_tokens() -> None:
    """The user adds tokens of their own to a returned cache."""
    parts = shared_parts("add")
    first = generate(parts, do_sample=False, max_new_tokens=5)
    begin = torch.cat([first.sequences, torch.tensor([[42, 17]])], dim=1)
    cached = generate(
        parts,
        do_sample=False,
        max_new_tokens=5,
        decoder_input_ids=begin,
        past_key_values=first.past_key_values,
        decoder_attention_mask=torch.ones_like(begin),
    )
    fresh = generate(parts, do_sample=False, max_new_tokens=5, decoder_input_ids=begin)
    assert cached.sequences.tolist() == fresh.sequences.tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_empty_cache_of_the_caller(kind: str) -> None:
    parts = shared_parts("add")
    config = parts.model.config.decoder
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    output = generate(parts, do_sample=False, past_key_values=cache)
    assert strip_padding(output.sequences)[0] == reference_greedy(parts, PROMPTS[0], LENGTH)[0]


def test_a_cache_of_another_model_is_an_error() -> None:
    parts = shared_parts("add")
    cache = parts.slm(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        generate(parts, past_key_values=cache)


def test_outputs_with_forced_starts_of_unequal_lengths() -> None:
    """Padding inside the output, marked by `decoder_attention_mask`, takes no position."""
    parts, beginnings = shared_parts("add"), [[END, 42], [END, 17, 63, 8], [END]]
    width = max(map(len, beginnings))
    ids = torch.tensor([[END] * (width - len(row)) + row for row in beginnings])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in beginnings])
    for cache in CACHES.values():
        output = generate(
            parts,
            "left",
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            **cache,
        )
        for row, (prompt, beginning) in enumerate(zip(PROMPTS, beginnings, strict=True)):
            sequence = output.sequences[row, width - len(beginning) + 1 :].tolist()
            expected = reference_logits(parts, prompt, sequence)[len(beginning) - 1 : -1].argmax(-1).tolist()
            assert sequence[len(beginning) - 1 :] == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    parts, batch = shared_parts("add"), pad_prompts(PROMPTS, "left")
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    states = parts.model.encode_prompt(**batch)
    expected = generate(parts, "left", do_sample=False).sequences.tolist()
    for prompt in (batch, {"encoder_outputs": states, "attention_mask": batch["attention_mask"]}):
        assert parts.model.generate(**prompt, max_new_tokens=LENGTH, do_sample=False).tolist() == expected


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_hidden_states_of_the_llm_replace_running_it(fusion: str, strategy: str) -> None:
    parts, batch = shared_parts(fusion), pad_prompts(PROMPTS)
    states = parts.model.encode_llm(**batch)
    kwargs = {"max_new_tokens": LENGTH, **STRATEGIES[strategy]}
    with count_calls(parts.model.encoder.llm) as calls:
        sequences = parts.model.generate(**batch, llm_hidden_states=states, **kwargs)
    assert not calls
    assert sequences.tolist() == parts.model.generate(**batch, **kwargs).tolist()


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_hidden_states_of_the_llm_alone_are_a_prompt(strategy: str) -> None:
    """A fusion that embeds no tokens generates from hidden states alone."""
    model, batch = shared_parts("replace").model, pad_prompts(PROMPTS)
    states, kwargs = model.encode_llm(**batch), {**STRATEGIES[strategy], "max_new_tokens": LENGTH}
    with count_calls(model.encoder.llm) as calls:
        sequences = model.generate(llm_hidden_states=states, attention_mask=batch["attention_mask"], **kwargs)
    assert not calls
    assert sequences.tolist() == model.generate(**batch, **kwargs).tolist()
    with pytest.raises(ValueError, match="Pass the `attention_mask`"):
        model.generate(llm_hidden_states=states, **kwargs)
    with pytest.raises(ValueError, match="pass its `input_ids` with `llm_hidden_states`"):
        shared_parts("add").model.generate(llm_hidden_states=states, attention_mask=batch["attention_mask"], **kwargs)


def test_an_encoder_decoder_slm() -> None:
    """The SLM's own encoder reads P; outputs do not depend on padding, cache or passed states."""
    llm = shared_parts("add").llm  # before the seed, as building it takes random numbers
    torch.manual_seed(3)
    slm = T5ForConditionalGeneration(t5_config("untied", vocab_size=SLM_VOCAB_SIZE, d_model=32, num_layers=1)).eval()
    for parameter in slm.parameters():
        parameter.data.mul_(3)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=llm, decoder_model=copy.deepcopy(slm), shared_tokenizer=False
    )
    parts = Parts(model, llm, slm)
    kwargs = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "num_beams": 2, "do_sample": False}
    expected = [
        slm.generate(inputs_embeds=reference_prompt(parts, prompt), **kwargs)[0].tolist() for prompt in PROMPTS
    ]
    assert len({tuple(sequence) for sequence in expected}) == len(PROMPTS)
    for side, cache in itertools.product(("left", "right"), CACHES.values()):
        batch = pad_prompts(PROMPTS, side)
        states = {"encoder_outputs": model.encode_prompt(**batch), "attention_mask": batch["attention_mask"]}
        assert model.generate(**batch, **kwargs, **cache).tolist() == expected
        assert model.generate(**states, **kwargs, **cache).tolist() == expected


@pytest.mark.parametrize("given", ["states", "tokens"])
def test_a_hand_written_decoding_loop_agrees_with_generate(given: str) -> None:
    """`forward` with its returned cache, one token at a time, as `generate()` does it."""
    parts, batch = shared_parts("add"), pad_prompts(PROMPTS)
    prompt = {"encoder_outputs": parts.model.encode_prompt(**batch)} if given == "states" else batch
    tokens, cache = torch.full((len(PROMPTS), 1), END), None
    for step in range(6):
        with torch.no_grad():
            output = parts.model(**prompt, decoder_input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert cache.get_seq_length() == step + 1
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
    assert tokens[:, 1:].tolist() == [reference_greedy(parts, prompt, 6)[0] for prompt in PROMPTS]


def test_two_threads_generate_at_once() -> None:
    """The model keeps nothing on itself between steps."""
    parts = shared_parts("add")
    strategies = [STRATEGIES["greedy"], STRATEGIES["beam"]]
    batches = [pad_prompts(PROMPTS[:2], "left"), pad_prompts(PROMPTS[1:], "right")]
    run = [(batch, kwargs) for batch in batches for kwargs in strategies]
    expected = [parts.model.generate(**batch, max_new_tokens=LENGTH, **kwargs).tolist() for batch, kwargs in run]
    results: list[Any] = [[] for _ in run]
    barrier = threading.Barrier(len(run))

    def work(index: int) -> None:
        barrier.wait()
        batch, kwargs = run[index]
        results[index] = [parts.model.generate(**batch, max_new_tokens=LENGTH, **kwargs).tolist() for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(run))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[sequence] * 4 for sequence in expected]


def test_encode_prompt_returns_what_generate_computes() -> None:
    """P packed to the right for a decoder-only SLM, with its mask, without gradient."""
    parts = shared_parts("add")
    for side in ("left", "right"):
        batch = pad_prompts(PROMPTS, side)
        states = parts.model.encode_prompt(**batch)
        assert not states.last_hidden_state.requires_grad
        assert states.attention_mask.tolist() == pad_prompts(PROMPTS, "left")["attention_mask"].tolist()
        for row, prompt in enumerate(PROMPTS):
            expected = reference_prompt(parts, prompt)[0]
            torch.testing.assert_close(states.last_hidden_state[row, -len(prompt) :], expected, rtol=1e-4, atol=1e-5)


def test_states_without_their_mask() -> None:
    """A bare tensor or tuple of states counts as a whole prompt, unless a mask is given with it."""
    parts = shared_parts("add")
    states = parts.model.encode_prompt(**pad_prompts(PROMPTS[:1]))
    expected = strip_padding(parts.model.generate(encoder_outputs=states, max_new_tokens=LENGTH, do_sample=False))
    output = parts.model(
        encoder_outputs=(states.last_hidden_state,), decoder_input_ids=torch.tensor([[END, *expected[0][:-1]]])
    )
    assert output.logits[0].argmax(-1).tolist() == expected[0]
