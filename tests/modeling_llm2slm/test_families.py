"""Every family of SLM with both kinds of LLM: stock `generate()` in every corner, against a slow reference."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import EncoderDecoderCache, MT5ForConditionalGeneration, StaticCache, TextIteratorStreamer

import modeling_llm2slm.generation_llm2slm as generation
import modeling_llm2slm.modeling_llm2slm as modeling
from tests.support import families
from tests.support.common import (
    FUSIONS,
    PROMPTS,
    Parts,
    SlowReference,
    build_family,
    check_outputs_vary,
    compose,
    count_calls,
    pad_prompts,
    pairwise,
    reference_logits,
    shared_family,
    slm_tokenizer,
    strip_padding,
)
from tests.support.families import END, PAD, SLM_VOCAB_SIZE


OLD_SLIDING_CACHE = Version(transformers.__version__) < Version("5.18")
LENGTH = 12  # new tokens
SEED = 7

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "return_sequences": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "off": {"use_cache": False},
}
ASSISTED = ("prompt_lookup", "composite", "plain")
PADDINGS = ("alone", "left", "right")

PAIRS = list(itertools.product(families.SLMS, ("t5", "llama"), FUSIONS))
# The fast tests take one of the six for each SLM, such that every LLM and fusion meets many SLMs.
FAST = [pair for index, pair in enumerate(PAIRS) if index % 6 == (index // 6) % 6]
SHARING = [(slm, slm, "cache") for slm in families.SHARING]
FAST += [pair for pair in SHARING if pair[0] in ("gemma3", "gpt2")]
GRID = [
    pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow, id="-".join(pair)) for pair in PAIRS + SHARING
]


def caches(slm: str) -> list[str]:
    return [cache for cache in CACHES if cache != "static" or slm not in families.NO_STATIC_CACHE]


@functools.cache
def expected(pair: tuple[str, str, str], strategy: str, row: int | None = None) -> Any:
    """What the slow reference generates for all prompts, or for one."""
    torch.manual_seed(SEED)
    reference = SlowReference(shared_family(*pair), PROMPTS if row is None else [PROMPTS[row]])
    kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True}
    return reference.run(**STRATEGIES[strategy], **kwargs)


def prompt_of(parts: Parts, prompts: list[list[int]], padding: str, passed: bool) -> dict[str, Any]:
    """Prompts as ids or as states computed before; padded by four more than they need, but for those alone."""
    batch = pad_prompts(prompts, side=padding, extra=0 if padding == "alone" else 4)
    return {"encoder_outputs": parts.model.encode_prompt(**batch)} if passed else batch


def check(actual: Any, wanted: Any) -> None:
    """Equal tokens, and equal logits up to float32's precision."""
    assert actual.sequences.tolist() == wanted.sequences.tolist()
    first, second = torch.cat(actual.logits), torch.cat(wanted.logits)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(second.std()))


@pytest.mark.parametrize(("slm", "llm", "fusion"), GRID)
def test_outputs_vary_and_differ_between_prompts(slm: str, llm: str, fusion: str) -> None:
    """Without this, equality below would prove nothing."""
    check_outputs_vary(strip_padding(expected((slm, llm, fusion), "greedy").sequences))


def check_parity(pair: tuple[str, str, str], strategy: str, padding: str, cache: str, passed: bool) -> None:
    """The slow reference's tokens and logits."""
    parts = shared_family(*pair)
    prompts = PROMPTS[:1] if padding == "alone" else PROMPTS
    batch = prompt_of(parts, prompts, padding, passed)
    torch.manual_seed(SEED)
    kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True}
    actual = parts.model.generate(**batch, **kwargs, **STRATEGIES[strategy], **CACHES[cache])
    check(actual, expected(pair, strategy, 0 if padding == "alone" else None))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("slm", "llm", "fusion"), GRID)
def test_parity(slm: str, llm: str, fusion: str, strategy: str) -> None:
    """
    Each strategy with every padding, every cache and both computed and passed states; over the strategies, every pair
    of these. `test_generation_llm2slm.py` takes every combination, for GPT-2.
    """
    shift = list(STRATEGIES).index(strategy)
    for combination in pairwise(shift, PADDINGS, caches(slm)):
        check_parity((slm, llm, fusion), strategy, *combination)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pair", PAIRS + SHARING, ids="-".join)
def test_parity_of_every_combination(pair: tuple[str, str, str], strategy: str) -> None:
    for combination in itertools.product(PADDINGS, caches(pair[0]), (False, True)):
        check_parity(pair, strategy, *combination)


def assistants(parts: Parts, kind: str, pair: tuple[str, str, str]) -> dict[str, Any]:
    if kind == "prompt_lookup":
        return {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if kind == "composite" and pair[2] == "cache":
        return {"assistant_model": shared_family(pair[0]).model}
    if kind == "composite":
        return {"assistant_model": shared_family(pair[0], pair[1], "replace" if pair[2] == "add" else "add").model}
    torch.manual_seed(3)
    config = families.SLMS["mt5"].config()  # as deep as its encoder: stock sizes the caches of a T5 by that
    assert config.vocab_size == SLM_VOCAB_SIZE
    return {"assistant_model": MT5ForConditionalGeneration(config).eval()}


@pytest.mark.parametrize("kind", ASSISTED)
@pytest.mark.parametrize(("slm", "llm", "fusion"), GRID)
def test_assisted(slm: str, llm: str, fusion: str, kind: str) -> None:
    """Prompt lookup and an assistant (another composite or a plain encoder-decoder) give the greedy output."""
    if (slm, kind) == ("gemma3", "composite") and OLD_SLIDING_CACHE:
        pytest.skip("before 5.18 a sliding cache gives more keys than its mask covers while an assistant drafts")
    pair = (slm, llm, fusion)
    parts = shared_family(*pair)
    for padding, passed in itertools.product(PADDINGS, (False, True)):
        if passed and kind != "prompt_lookup":
            continue  # stock assisted generation runs the assistant's own encoder over token ids
        wanted = expected(pair, "greedy", 0)
        batch = prompt_of(parts, PROMPTS[:1], padding, passed)
        kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True}
        check(parts.model.generate(**batch, do_sample=False, **kwargs, **assistants(parts, kind, pair)), wanted)


# One pair for each SLM: what is the same for every LLM and fusion.


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("slm", families.SLMS)
def test_each_encoder_runs_once(slm: str, strategy: str) -> None:
    parts = shared_family(slm)
    with count_calls(parts.model.encoder.llm) as llm_calls:
        if parts.slm.config.is_encoder_decoder:
            with count_calls(parts.model.decoder.get_encoder()) as calls:
                parts.model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, **STRATEGIES[strategy])
            assert len(calls) == 1
        else:
            parts.model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, **STRATEGIES[strategy])
    assert len(llm_calls) == 1


@pytest.mark.parametrize("slm", [name for name, slm in families.SLMS.items() if not slm.config().is_encoder_decoder])
def test_a_batch_wider_than_the_positions_generates(slm: str) -> None:
    """A long prompt and a long output in other rows: each row fits, all of them padded together do not."""
    model = build_family(slm).model
    prompts, sequences = [[3] * 40, [4, 5]], [[6, 7], list(range(2, 42))]
    labels = torch.full((2, 40), -100)
    for row, sequence in zip(labels, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    if slm == "gpt_neo":  # whose own mask is as wide as its positions
        with pytest.raises(ValueError, match="together 80, but the SLM has 64 positions"):
            model(**pad_prompts(prompts), labels=labels)
        return
    apart = [
        model(**pad_prompts([prompt]), labels=torch.tensor([sequence])).loss * len(sequence)
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]
    together = model(**pad_prompts(prompts), labels=labels).loss
    torch.testing.assert_close(together, sum(apart) / sum(map(len, sequences)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slm", families.NO_STATIC_CACHE)
def test_a_static_cache_that_transformers_computes_wrongly_is_refused(slm: str) -> None:
    model = shared_family(slm).model
    cache = StaticCache(config=model.config.decoder, max_cache_len=40)
    for kwargs in (CACHES["static"], {"past_key_values": cache}):
        with pytest.raises(ValueError, match="static cache is not supported"):
            model.generate(**pad_prompts(PROMPTS), max_new_tokens=4, **kwargs)


@pytest.mark.parametrize("slm", families.SLMS)
def test_a_forced_start_of_the_output(slm: str) -> None:
    """`decoder_input_ids` are kept, and the output continues them."""
    parts, forced = shared_family(slm), [42, 17, 63]
    begin = torch.tensor([[END, *forced]] * len(PROMPTS))
    for cache in caches(slm):
        output = parts.model.generate(
            **pad_prompts(PROMPTS, "left"), decoder_input_ids=begin, max_new_tokens=6, do_sample=False, **CACHES[cache]
        )
        for row, prompt in enumerate(PROMPTS):
            sequence = strip_padding(output)[row]
            assert sequence[:3] == forced
            assert sequence[3:] == reference_logits(parts, prompt, sequence)[3:-1].argmax(-1).tolist()


@pytest.mark.parametrize(("passed", "mask"), [(False, True), (True, False)], ids=["computed-mask", "passed"])
@pytest.mark.parametrize("slm", families.SLMS)
def test_an_output_is_continued_from_its_cache(slm: str, passed: bool, mask: bool) -> None:
    parts = shared_family(slm)
    whole = expected((slm, "t5", "add"), "greedy").sequences
    batch = prompt_of(parts, PROMPTS, "right", passed)
    first = parts.model.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    kwargs = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
    if mask:
        kwargs["decoder_attention_mask"] = torch.ones_like(first.sequences)
    with count_calls(parts.model.encoder.llm) as calls:
        second = parts.model.generate(**batch, **kwargs, max_new_tokens=LENGTH - 5, do_sample=False)
    assert len(calls) == (0 if passed else 1)
    assert second.tolist() == whole.tolist()


@pytest.mark.parametrize("slm", ["gpt2", "gemma3", "t5"])
def test_a_cache_that_holds_the_whole_output_is_an_error(slm: str) -> None:
    """Nothing is left to continue from; without an error, outputs would be wrong."""
    model, batch = shared_family(slm).model, pad_prompts(PROMPTS)
    first = model.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    for begin in (first.sequences[:, :-1], first.sequences[:, :3]):
        with pytest.raises(ValueError, match="holds 5 output tokens"):
            model.generate(**batch, decoder_input_ids=begin, past_key_values=first.past_key_values, max_new_tokens=3)


@pytest.mark.parametrize("slm", families.SLMS)
def test_prefix_allowed_tokens_fn(slm: str) -> None:
    """It gets the row of the prompt and the output so far; tokens it does not allow are never generated."""
    parts, allowed = shared_family(slm), [[11, 12, 13], [21, 22, 23], [31, 32, 33]]
    output = parts.model.generate(
        **pad_prompts(PROMPTS, "left"),
        prefix_allowed_tokens_fn=lambda row, tokens: allowed[row],
        num_beams=2,
        max_new_tokens=5,
    )
    for row, sequence in enumerate(output[:, 1:].tolist()):
        assert set(sequence) <= set(allowed[row])


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("slm", families.SLMS)
def test_compute_transition_scores(slm: str, strategy: str) -> None:
    """They are the log-probabilities that the slow reference gives the tokens."""
    parts = shared_family(slm)
    output = parts.model.generate(
        **pad_prompts(PROMPTS),
        max_new_tokens=6,
        min_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        **STRATEGIES[strategy],
    )
    beams = getattr(output, "beam_indices", None)
    scores = parts.model.compute_transition_scores(
        output.sequences, output.scores, beams, normalize_logits=strategy == "greedy"
    )
    if strategy == "beam":
        torch.testing.assert_close(scores.sum(-1) / 6, output.sequences_scores, rtol=1e-3, atol=1e-3)
        return
    for row, prompt in enumerate(PROMPTS):
        sequence = output.sequences[row, 1:].tolist()
        logits = reference_logits(parts, prompt, sequence)[:-1]
        logits[:, END] = -torch.inf  # by `min_new_tokens`
        wanted = logits.log_softmax(-1)[range(6), sequence]
        torch.testing.assert_close(scores[row], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slm", families.SLMS)
def test_a_streamer_gets_every_token(slm: str) -> None:
    parts, tokenizer = shared_family(slm), slm_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    parts.model.generate(**pad_prompts(PROMPTS[:1]), streamer=streamer, max_new_tokens=LENGTH, do_sample=False)
    sequence = strip_padding(expected((slm, "t5", "add"), "greedy", 0).sequences)[0]
    assert "".join(streamer) == tokenizer.decode(sequence, skip_special_tokens=True)


@pytest.mark.parametrize("cache", ["dynamic", "off"])
@pytest.mark.parametrize("slm", families.SLMS)
def test_lengths_of_what_is_returned(slm: str, cache: str) -> None:
    """Hidden states cover output positions; a decoder-only SLM attends to N + output so far (or to its window)."""
    parts = build_family(slm)
    model, steps = parts.model, 4
    model.set_attn_implementation("eager")
    batch = pad_prompts(PROMPTS)
    width, config = batch["input_ids"].shape[1], model.config.get_text_config(decoder=True)
    output = model.generate(
        **batch,
        max_new_tokens=steps,
        min_new_tokens=steps,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        do_sample=False,
        **CACHES[cache],
    )
    for step in range(steps):
        new = step + 1 if cache == "off" else 1
        states, attentions = output.decoder_hidden_states[step], output.decoder_attentions[step]
        assert len(states) == config.num_hidden_layers + 1
        assert len(attentions) == config.num_hidden_layers
        assert {layer.shape[:2] for layer in states} == {(len(PROMPTS), new)}
        seen = step + 1 if parts.slm.config.is_encoder_decoder else width + step + 1
        assert {layer.shape[-2] for layer in attentions} == {new}
        assert attentions[-1].shape[-1] == seen  # the last layer of every family attends to all
        if parts.slm.config.is_encoder_decoder:
            assert {layer.shape[-1] for layer in output.cross_attentions[step]} == {width}
    assert len(output.encoder_hidden_states) == 4
    assert len(output.encoder_attentions) == 3


CHOICES = [True, 1, (0, -1), [-2], [9, -9, 1], [], 0, False, None]


def chosen(states: tuple[torch.Tensor, ...], choice: Any) -> list[int] | None:
    """Return the indices of the hidden states that a value of `output_hidden_states` requests."""
    if not choice:
        return None
    indices = [choice] if type(choice) is int else range(len(states)) if choice is True else choice
    return [range(len(states))[index] for index in indices if -len(states) <= index < len(states)]


def check_chosen(actual: Any, states: tuple[torch.Tensor, ...], choice: Any) -> None:
    """The hidden states that are chosen, each at its place, and `None` for the others."""
    kept = chosen(states, choice)
    if kept is None:
        assert actual is None
        return
    assert [index for index, layer in enumerate(actual) if layer is not None] == sorted(set(kept))
    assert len(actual) == len(states)
    for index in kept:
        torch.testing.assert_close(actual[index], states[index])


LAYERS = [(slm, "t5") for slm in families.SLMS] + [("gpt2", llm) for llm in families.LLMS if llm != "t5"]


@pytest.mark.parametrize(("slm", "llm"), LAYERS)
def test_hidden_states_of_chosen_layers(slm: str, llm: str) -> None:
    """Both models count their own layers, also those of an LLM that is cut, and of stacks of unequal depth."""
    layer = families.LLMS[llm].layer or (2 if llm == "t5" else None)
    model = compose(families.build_llm(llm), families.build_slm(slm), "add", encoder_layer=layer).model
    batch = {**pad_prompts(PROMPTS, "left"), "decoder_input_ids": torch.tensor([[END, 5, 6]] * len(PROMPTS))}
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True)
        for choice in CHOICES:
            output = model(**batch, output_hidden_states=choice)
            check_chosen(output.decoder_hidden_states, whole.decoder_hidden_states, choice)
            check_chosen(output.encoder_hidden_states, whole.encoder_hidden_states, choice)
            states = model.get_encoder()(**pad_prompts(PROMPTS, "left"), output_hidden_states=choice)
            check_chosen(states.hidden_states, whole.encoder_hidden_states, choice)
        for config in (model.config, model.config.encoder, model.config.decoder):
            config.output_hidden_states = [0, -1]
            output = model(**batch)
            of_slm, of_llm = output.decoder_hidden_states, output.encoder_hidden_states
            if config is not model.config.encoder:
                check_chosen(of_slm, whole.decoder_hidden_states, [0, -1])
            if config is not model.config.decoder:
                check_chosen(of_llm, whole.encoder_hidden_states, [0, -1])
            assert model(**batch, output_hidden_states=False).decoder_hidden_states is None
            config.output_hidden_states = False


@pytest.mark.parametrize(
    ("slm", "strategy"),
    [(slm, "greedy") for slm in families.SLMS] + list(itertools.product(("gpt2", "t5"), ("sampling", "beam"))),
)
def test_generate_returns_hidden_states_of_chosen_layers(slm: str, strategy: str) -> None:
    model = shared_family(slm).model
    kwargs = {**pad_prompts(PROMPTS), **STRATEGIES[strategy], "max_new_tokens": 3, "return_dict_in_generate": True}
    outputs = []
    for choice in (True, [0, -1]):
        torch.manual_seed(SEED)
        outputs.append(model.generate(**kwargs, output_hidden_states=choice))
    whole, some = outputs
    assert some.sequences.tolist() == whole.sequences.tolist()
    check_chosen(some.encoder_hidden_states, whole.encoder_hidden_states, [0, -1])
    for step, states in zip(some.decoder_hidden_states, whole.decoder_hidden_states, strict=True):
        check_chosen(step, states, [0, -1])
    config = copy.deepcopy(model.generation_config)
    config.update(output_hidden_states=[1], return_dict_in_generate=True, max_new_tokens=2)
    states = model.generate(**pad_prompts(PROMPTS), generation_config=config).decoder_hidden_states[1]
    assert [index for index, layer in enumerate(states) if layer is not None] == [1]


def shapes(outputs: Any) -> Any:
    """Return the shapes of nested tuples of tensors."""
    return tuple(map(shapes, outputs)) if isinstance(outputs, tuple) else outputs.shape


@pytest.mark.parametrize(
    ("slm", "kind", "do_sample"),
    [(slm, kind, False) for slm in ("gpt2", "gemma3", "t5", "bart") for kind in ASSISTED]
    + [(slm, kind, True) for slm, kind in zip(("gpt2", "t5", "bart"), ASSISTED, strict=True)],
)
def test_drafts_give_the_outputs_of_generation_without_them(slm: str, kind: str, do_sample: bool) -> None:
    """Every `output_*` flag: the outputs of each step, or an error before any compute."""
    model, pair = build_family(slm).model, (slm, "t5", "add")
    model.set_attn_implementation("eager")
    drafts, batch = assistants(shared_family(slm), kind, pair), pad_prompts(PROMPTS[:1])
    kwargs = {**batch, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": do_sample}
    fields = {
        "output_scores": ("scores",),
        "output_logits": ("logits",),
        "output_hidden_states": ("decoder_hidden_states", "encoder_hidden_states"),
        "output_attentions": ("decoder_attentions", "cross_attentions", "encoder_attentions"),
    }
    for flag, names in fields.items():
        if flag == "output_attentions" and not model.config.decoder.is_encoder_decoder:
            continue
        drafted = model.generate(**kwargs, **drafts, return_dict_in_generate=True, **{flag: True})
        plain = model.generate(**kwargs, return_dict_in_generate=True, **{flag: True})
        for name in names:
            first, second = getattr(drafted, name), getattr(plain, name)
            assert shapes(first) == shapes(second), name
            if not do_sample and name in ("scores", "logits"):  # stock repeats positions of other outputs
                torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    wrong = [{"output_hidden_states": choice} for choice in (1, [0, -1])]
    if not model.config.decoder.is_encoder_decoder:
        wrong.append({"output_attentions": True})
    for flags in wrong:
        with (
            count_calls(model.encoder.llm) as calls,
            pytest.raises(ValueError, match="not supported with prompt lookup or an assistant"),
        ):
            model.generate(**kwargs, **drafts, return_dict_in_generate=True, **flags)
        assert not calls
        assert model.generate(**kwargs, **drafts, **flags).shape == (1, 7)  # tokens alone


@pytest.mark.parametrize("fusion", ["add", "cache"])
def test_drafts_that_stock_generation_cannot_make_are_refused_before_any_compute(fusion: str) -> None:
    model, wrong = shared_family("llama", "llama", fusion).model, [{"assistant_early_exit": 1}]
    if fusion == "cache":  # the SLM has no hidden states of the first output token
        wrong.append({"prompt_lookup_num_tokens": 2, "return_dict_in_generate": True, "output_hidden_states": True})
    for flags in wrong:
        with count_calls(model.encoder.llm) as calls, pytest.raises(ValueError, match="is not supported"):
            model.generate(**pad_prompts(PROMPTS[:1]), max_new_tokens=4, **flags)
        assert not calls


@pytest.mark.parametrize("slm", families.SLMS)
def test_logits_to_keep(slm: str) -> None:
    """The last few positions, or those of a tensor."""
    parts = shared_family(slm)
    batch = {**pad_prompts(PROMPTS), "decoder_input_ids": torch.tensor([[END, 5, 6, 7, 8]] * len(PROMPTS))}
    with torch.no_grad():
        whole = parts.model(**batch).logits
        for kept, wanted in ((2, whole[:, -2:]), (torch.tensor([0, 3]), whole[:, [0, 3]])):
            torch.testing.assert_close(parts.model(**batch, logits_to_keep=kept).logits, wanted)


@pytest.mark.parametrize("slm", families.SLMS)
def test_batches_of_1_to_17(slm: str) -> None:
    """A row's output does not depend on the number or order of the other rows."""
    parts = shared_family(slm)
    sequences = strip_padding(expected((slm, "t5", "add"), "greedy").sequences)
    for size in (1, 2, 5, 17):
        rows = [(7 * index + size) % 3 for index in range(size)]
        batch = pad_prompts([PROMPTS[row] for row in rows], "left" if size % 2 else "right")
        output = parts.model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
        assert strip_padding(output) == [sequences[row] for row in rows]


@pytest.mark.parametrize("slm", families.SLMS)
def test_bfloat16(slm: str) -> None:
    """Logits within bfloat16's precision of float32's, padded or not."""
    parts = build_family(slm)
    batch = {**pad_prompts(PROMPTS), "decoder_input_ids": torch.tensor([[END, 5, 6, 7, 8]] * len(PROMPTS))}
    with torch.no_grad():
        wanted = parts.model(**batch).logits
        half = parts.model.to(torch.bfloat16)
        for side in ("right", "left"):
            actual = half(**{**batch, **pad_prompts(PROMPTS, side)}).logits.float()
            assert (actual - wanted).abs().max() < 0.1 * wanted.std()
    assert parts.model.generate(**pad_prompts(PROMPTS), max_new_tokens=4).shape == (3, 5)


@pytest.mark.parametrize("length", [1, 50])
@pytest.mark.parametrize("slm", families.SLMS)
def test_the_shortest_and_the_longest_prompt(slm: str, length: int) -> None:
    """A prompt of one token, and one that fills the SLM's positions to the last."""
    parts = shared_family(slm)
    prompt = [(13 * index + 5) % 90 + 3 for index in range(length)]
    limit = 64 - length if length > 1 and not parts.slm.config.is_encoder_decoder else 14
    output = parts.model.generate(torch.tensor([prompt]), max_new_tokens=limit, min_new_tokens=limit, do_sample=False)
    sequence = output[0, 1:].tolist()
    logits = reference_logits(parts, prompt, sequence[:-1])
    logits[:, END] = -torch.inf  # by `min_new_tokens`
    assert sequence == logits.argmax(-1).tolist()


@pytest.mark.parametrize("slm", families.SLMS)
def test_too_long_and_empty_prompts_are_errors(slm: str) -> None:
    parts = shared_family(slm)
    with pytest.raises(ValueError, match="prompt is empty"):
        parts.model.generate(torch.tensor([[5, 6], [PAD, PAD]]), max_new_tokens=2)
    if getattr(parts.slm.config, "max_position_embeddings", None) is None:
        return  # relative positions: T5
    with count_calls(parts.model.encoder.llm) as calls, pytest.raises(ValueError, match="70 tokens.*64 positions"):
        parts.model.generate(torch.full((1, 70), 5), max_new_tokens=2)
    with pytest.raises(ValueError, match="up to 70, .*64 positions"):
        parts.model.generate(torch.full((1, 5), 5), max_new_tokens=70)
    assert not calls


@pytest.mark.parametrize("slm", ["gpt2", "bart"])
def test_a_too_long_output_in_forward_is_an_error(slm: str) -> None:
    """`forward` checks lengths also if states or a cache are given."""
    model = shared_family(slm).model
    states = model.encode_prompt(**pad_prompts(PROMPTS))
    with torch.no_grad(), pytest.raises(ValueError, match="64 positions"):
        model(encoder_outputs=states, decoder_input_ids=torch.full((3, 70), 5))
    if slm == "gpt2":
        half = {"encoder_outputs": states, "decoder_input_ids": torch.full((3, 30), 5)}
        with torch.no_grad():
            cache = model(**half).past_key_values
        with torch.no_grad(), pytest.raises(ValueError, match="64 positions"):
            model(**half, past_key_values=cache)


@pytest.mark.parametrize("slm", families.SLMS)
def test_a_cache_of_a_prompt_of_another_width_is_an_error(slm: str) -> None:
    model, kwargs = shared_family(slm).model, {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(**pad_prompts(PROMPTS), **kwargs, return_dict_in_generate=True)
    more = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="begins with a prompt of width 12, but this one has 15"):
        model.generate(**pad_prompts(PROMPTS, extra=3), **more, **kwargs)


@pytest.mark.parametrize("slm", ["gpt2", "t5"])
def test_states_as_a_tuple(slm: str) -> None:
    model, kwargs = shared_family(slm).model, {"max_new_tokens": LENGTH, "do_sample": False}
    states = model.encode_prompt(**pad_prompts(PROMPTS[:1]))
    assert (
        model.generate(encoder_outputs=(states[0],), **kwargs).tolist()
        == expected((slm, "t5", "add"), "greedy", 0).sequences.tolist()
    )


# The grid can fail: each planted fault is found in every family.


def drop_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling.LLM2SLMEncoder.prompt_mask
    monkeypatch.setattr(
        modeling.LLM2SLMEncoder, "prompt_mask", lambda self, *a, **k: torch.ones_like(original(self, *a, **k))
    )


def shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of tokens after the first step are too high by one."""
    original = modeling.mask_and_positions

    def faulty(prompt_mask: Any, output_mask: Any, output_length: int, cache: Any) -> Any:
        mask, positions = original(prompt_mask, output_mask, output_length, cache)
        return mask, positions + int(cache is not None and cache.prompt_length > 0)

    for module in (modeling, generation):
        monkeypatch.setattr(module, "mask_and_positions", faulty)


def keep_the_beams_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderDecoderCache, "reorder_cache", lambda self, beam_idx: None)


def take_states_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling.LLM2SLMEncoder.forward

    @functools.wraps(original)  # stock generation reads the signature
    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = original(self, *args, **kwargs)
        states.last_hidden_state = states.last_hidden_state.roll(1, dims=0)
        return states

    monkeypatch.setattr(modeling.LLM2SLMEncoder, "forward", faulty)


@pytest.mark.parametrize(
    ("plant", "strategy"),
    [
        (drop_the_mask, "greedy"),
        (shift_positions, "greedy"),
        (keep_the_beams_in_place, "beam_sampling"),
        (take_states_of_another_row, "greedy"),
    ],
)
@pytest.mark.parametrize("slm", families.SLMS)
def test_a_planted_fault_breaks_parity(slm: str, plant: Any, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shared_family(slm)
    if plant is shift_positions and parts.slm.config.is_encoder_decoder:
        pytest.skip("an encoder-decoder SLM computes the output's positions itself")
    wanted = expected((slm, "t5", "add"), strategy)
    kwargs = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_logits": True, **STRATEGIES[strategy]}
    for planted in (False, True):
        if planted:
            plant(monkeypatch)
        torch.manual_seed(SEED)
        actual = parts.model.generate(**pad_prompts(PROMPTS, "right", extra=4), **kwargs)
        if planted:
            with pytest.raises(AssertionError):
                check(actual, wanted)
        else:
            check(actual, wanted)


def test_reference_page_lists_these_families() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/models.md").read_text(encoding="utf-8")
    listed = page.partition("<!-- families -->\n")[2].partition("\n<!-- end of families -->")[0]
    assert listed == families.tables(), f"docs/reference/models.md should list:\n{families.tables()}"
