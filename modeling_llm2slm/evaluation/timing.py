"""
The timing harness: contestants take turns, round by round, so that other load on the machine slows all of them alike.

A contestant is any callable that takes a round (a prompt, an index, a cell of a benchmark) and returns what it
measured: a [`Timing`], or seconds. [`time_in_turns`] calls them, [`seconds_of`], [`time_output`] and [`time_tokens`]
measure one call, and [`speed`] and [`median_timing`] summarize.

Example:

```python
from modeling_llm2slm.evaluation.timing import speed, time_in_turns, time_output

contestants = {name: partial(time_output, model, max_new_tokens=64) for name, model in models.items()}
speeds = {name: speed(timings) for name, timings in time_in_turns(contestants, prompts).items()}
```
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


if TYPE_CHECKING:
    from ..inference.text_to_text import TextToText


Round = TypeVar("Round")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """
    Time of one generation.

    Args:
        total: Seconds from the prompt to the last token.
        tokens: Number of generated tokens, end tokens included.
        first: Seconds from the prompt to the first token; `None` if it was not measured.
        per_token: Seconds of each later token, the median where each was measured; `None` if none was.
    """

    total: float
    tokens: int
    first: float | None = None
    per_token: float | None = None


def time_in_turns(
    contestants: Mapping[str, Callable[[Round], Result]],
    rounds: Sequence[Round],
    *,
    warm_up: Round | None = None,
    progress: Callable[[int, str], None] = lambda number, name: None,
) -> dict[str, list[Result]]:
    """
    Call every contestant once per round. Each round starts with the next contestant, so that none always goes first.

    Args:
        contestants: What to time, by name.
        rounds: The argument of each round. Repeat one to measure it several times.
        warm_up: The argument of an untimed call of each contestant before the first round. Default: the first round's.
        progress: Called before each call with the number of the round (0 for the warm-up) and the contestant's name.

    Returns:
        What each contestant returned, by name, in the order of the rounds.
    """
    if not rounds:
        return {name: [] for name in contestants}
    for name, contestant in contestants.items():
        progress(0, name)
        contestant(rounds[0] if warm_up is None else warm_up)
    results: dict[str, list[Result]] = {name: [] for name in contestants}
    names = list(contestants)
    for number, argument in enumerate(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            progress(number + 1, name)
            results[name].append(contestants[name](argument))
    return results


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes, the accelerator's queue included."""
    _synchronize()
    start = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start


def time_output(text_to_text: TextToText, prompt: str, **generate_kwargs: Any) -> Timing:
    """
    Time the output of one prompt from text to text: tokenizing and decoding count.

    Args:
        text_to_text: The model.
        prompt: The prompt.
        generate_kwargs: Arguments of `generate()`.
    """
    tokens: list[list[int]] = []

    def generate() -> None:
        tokens.extend(text_to_text.generate_tokens([prompt], **generate_kwargs))
        text_to_text.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    total = seconds_of(generate)
    return Timing(total, len(tokens[0]))


def time_tokens(model: Any, inputs: Mapping[str, Any], new_tokens: int, **generate_kwargs: Any) -> Timing:
    """
    Time `model.generate()` token by token, greedily unless `generate_kwargs` say otherwise.

    Args:
        model: A model whose generation config has no end token, so that each output has `new_tokens` tokens.
        inputs: The prompts as tensors `(batch, N)`, or the encoder's output for them.
        new_tokens: Length of the outputs, in tokens.
        generate_kwargs: More arguments of `generate()`, such as `num_beams`.
    """
    clock = _StepClock()
    model.generate(
        **inputs,
        **{"do_sample": False, **generate_kwargs},
        max_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    total = time.perf_counter() - clock.times[0]
    later = [end - start for start, end in zip(clock.times[1:], clock.times[2:], strict=False)]
    return Timing(total, new_tokens, clock.times[1] - clock.times[0], statistics.median_high(later) if later else 0.0)


def speed(timings: Sequence[Timing]) -> dict[str, float]:
    """
    Summarize the outputs of different prompts.

    Returns:
        `ms_per_output`, `ms_per_token`, `tokens_per_output` (means) and `timed_outputs`; empty without timings.
    """
    if not timings:
        return {}
    seconds, tokens = sum(timing.total for timing in timings), sum(timing.tokens for timing in timings)
    return {
        "ms_per_output": 1000 * seconds / len(timings),
        "ms_per_token": 1000 * seconds / tokens,
        "tokens_per_output": tokens / len(timings),
        "timed_outputs": len(timings),
    }


def median_timing(timings: Sequence[Timing]) -> Timing:
    """Return the median of each time of repetitions of the same generation."""

    def median(values: list[float | None]) -> float | None:
        measured = [value for value in values if value is not None]
        return statistics.median(measured) if measured else None

    return Timing(
        statistics.median(timing.total for timing in timings),
        timings[0].tokens,
        median([timing.first for timing in timings]),
        median([timing.per_token for timing in timings]),
    )


class _StepClock(StoppingCriteria):
    """Records the time at which each token is complete, and never stops a generation."""

    def __init__(self) -> None:
        _synchronize()
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        _synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _synchronize() -> None:
    """Wait for the work that an accelerator has in its queue."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
