"""Two models take turns on one prompt, and are measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.jobs import Decoding
from modeling_llm2slm.serving.playground.comparison import LLM, LLM2SLM, STOPPED, Comparison
from modeling_llm2slm.serving.playground.llm import ComparedLLM
from tests.support.serving import slow, wait_until


PROMPT = "src1 src2 src3"
Compare = Callable[..., Comparison]
Load = Callable[[str], TextToText]


@pytest.mark.parametrize(
    ("kind", "stages"), [("llm", ["encoding", "decoding"]), ("slm", ["prompt and decoding"])], ids=["t5", "gpt2"]
)
def test_each_model_generates_its_own_text_and_its_stages_add_up(
    kind: str, stages: list[str], compare: Compare, load: Load
) -> None:
    comparison = compare(ComparedLLM(load(kind)))
    *_, last = comparison.run(PROMPT, Decoding(6))
    assert list(last) == [LLM2SLM, LLM]
    for name, own in ((LLM2SLM, "llm2slm"), (LLM, kind)):
        output, model = last[name], load(own)
        tokens = model.generate_tokens([PROMPT], max_new_tokens=6)
        assert output.finished
        assert output.tokens == len(tokens[0])
        assert output.text == model.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]
        assert sum(output.stages.values()) == pytest.approx(output.seconds)
        assert output.tokens_per_second == pytest.approx(output.tokens / output.seconds)
    assert list(last[LLM2SLM].stages) == ["LLM encoding", "projection", "decoding"]
    assert min(last[LLM2SLM].stages.values()) > 0
    assert list(last[LLM].stages) == stages


def test_turns_do_not_overlap_and_text_arrives_in_pieces(compare: Compare, load: Load) -> None:
    comparison = compare(ComparedLLM(load("llm")))
    model = comparison.contestants[LLM2SLM].text_to_text
    with slow(model, 0.12):
        steps = list(comparison.run(PROMPT, Decoding(4)))
    ours = [step[LLM2SLM].tokens for step in steps if LLM not in step]
    assert ours == sorted(ours)
    assert len(set(ours)) >= 3
    assert all(step[LLM2SLM].finished for step in steps if LLM in step)
    assert steps[-1][LLM2SLM].seconds > 0.4
    assert steps[-1][LLM2SLM].stages["decoding"] > 0.4


def test_seed_repeats_samples(compare: Compare, load: Load) -> None:
    comparison = compare(ComparedLLM(reason="none"))
    decoding = Decoding(12, temperature=2.0, seed=1)
    first, second = ([*comparison.run(PROMPT, decoding)][-1][LLM2SLM].text for _ in range(2))
    assert first == second


def test_an_impossible_prompt_is_refused_by_each_model(compare: Compare, load: Load) -> None:
    comparison = compare(ComparedLLM(load("llm")), max_prompt_tokens=50)
    for prompt, message in (("", "is empty"), ("  ", "is empty"), ("src1 " * 60, "at most 50 are allowed")):
        *_, last = comparison.run(prompt, Decoding(4))
        assert message in last[LLM2SLM].error
        assert message in last[LLM].error


def test_a_failure_of_one_model_leaves_the_other(
    compare: Compare, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare(ComparedLLM(load("llm")))
    model = comparison.contestants[LLM2SLM].text_to_text
    monkeypatch.setattr(model, "write", lambda *args, **kwargs: 1 / 0)
    *_, last = comparison.run(PROMPT, Decoding(4))
    assert last[LLM2SLM].error == "The model failed: division by zero"
    assert last[LLM].finished


def test_closing_ends_the_output_and_a_stop_of_the_server_is_named(compare: Compare) -> None:
    comparison = compare(ComparedLLM(reason="none"))
    batcher = comparison.service.batcher
    with slow(comparison.contestants[LLM2SLM].text_to_text, 0.12):
        running = comparison.run(PROMPT, Decoding(50))
        while not next(running)[LLM2SLM].tokens:
            pass
        running.close()
        wait_until(lambda: not batcher.running)
        running = comparison.run(PROMPT, Decoding(50))
        while not next(running)[LLM2SLM].tokens:
            pass
        batcher._stopping = True
        for job in batcher._batch:
            job.cancel()
        assert [*running][-1][LLM2SLM].error == STOPPED
