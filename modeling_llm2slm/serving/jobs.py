"""Jobs of the server: a prompt to generate for, how to generate, and the output piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..inference.text_stream import TextStream
from ..inference.text_to_text import TextToText


LEAST_LOGPROB = -9999.0  # JSON has no infinite numbers
FinishReason = Literal["stop", "length"]  # at an end token or a stop text; at the limit of tokens


@dataclass(frozen=True)
class Decoding:
    """
    How an output is generated.

    Args:
        max_tokens: Longest output, in tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Sample from the most likely tokens with this total probability.
        seed: Seed of sampling; None takes another one each time.
        stop: The output ends before the first of these texts.
        logprobs: For each token, also return the log-probabilities of this many likeliest tokens. None returns none.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """
    A token of an output and its log-probability, before temperature and top-p.

    Args:
        text: The text of the token.
        logprob: Its log-probability.
        top: The likeliest tokens in its place and their log-probabilities, and the token itself.
        offset: Where its text begins, in characters of the output.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """
    A part of an output.

    Args:
        text: The text that comes next.
        finish_reason: Why the output ends, in the last piece; else None.
        tokens: The number of tokens so far, the end token included.
        logprobs: The log-probabilities of the tokens since the last piece, if they were asked for.
    """

    text: str
    finish_reason: FinishReason | None = None
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None


class Job:
    """
    A prompt to generate for.

    Args:
        ids: Its token ids.
        decoding: How to generate.
        send: Called in the batcher's thread with each [`Piece`], or with the exception that ended the generation.
        stream: Whether to send pieces as they are generated. Otherwise the whole output is one piece.

    Attributes:
        tokens_left: How many tokens its output may still get.
    """

    def __init__(
        self,
        ids: Sequence[int],
        decoding: Decoding,
        send: Callable[[Piece | Exception], None],
        stream: bool = False,
    ):
        self.ids = list(ids)
        self.decoding = decoding
        self.send = send
        self.stream = stream
        self.cancelled = False
        self.tokens_left = decoding.max_tokens

    def cancel(self) -> None:
        """Stop generating: nobody waits for the output any more."""
        self.cancelled = True


class Completion:
    """The output of one row of a batch: its tokens so far, and their text."""

    def __init__(self, job: Job, text_to_text: TextToText):
        self.job = job
        self.decoding = job.decoding
        self.tokens: list[int] = []
        self.text = ""  # as far as it was sent
        self.finish_reason: FinishReason | None = None
        self.generator: torch.Generator | None = None
        self.scores: torch.Tensor | None = None  # log-probabilities of the next token, if they are asked for
        self._tokenizer = text_to_text.tokenizer
        self._text = TextStream(self._tokenizer, job.decoding.stop)
        self._logprobs: list[TokenLogprob] = []  # those that were not sent
        self._offset = 0
        self._end_ids = _end_ids(text_to_text)

    @property
    def done(self) -> bool:
        return self.job.cancelled or self.finish_reason is not None

    def add_token(self, token: int, logprobs: Mapping[int, float] | None = None) -> None:
        """Add a token, with log-probabilities by token id, and send the text that can no longer change."""
        if logprobs is not None:
            self._add_logprobs(token, logprobs)
        self.tokens.append(token)
        self.job.tokens_left -= 1
        if token in self._end_ids:
            self._finish("stop")
        elif len(self.tokens) >= self.decoding.max_tokens:
            self._finish("length")
        elif self.job.stream or self.decoding.stop:
            self._text.add(self.tokens)
            if self._text.stopped:
                self._finish("stop")
            elif self.job.stream and (text := self._text.take()):
                self._send(text)

    def set_tokens(self, tokens: Sequence[int]) -> None:
        """Set all tokens of a finished output, and send its text."""
        self.tokens = list(tokens)
        ended = any(token in self._end_ids for token in tokens) or len(tokens) < self.decoding.max_tokens
        self._finish("stop" if ended else "length")

    def likeliest(self, token: int) -> dict[int, float] | None:
        """Return the log-probabilities of the likeliest next tokens and of `token`, if they are asked for."""
        if self.scores is None or self.decoding.logprobs is None:
            return None
        values, ids = self.scores.topk(min(self.decoding.logprobs, len(self.scores)))
        return {**dict(zip(ids.tolist(), values.tolist(), strict=True)), token: float(self.scores[token])}

    def _add_logprobs(self, token: int, logprobs: Mapping[int, float]) -> None:
        finite = {other: max(value, LEAST_LOGPROB) for other, value in logprobs.items()}
        ordered = sorted(finite.items(), key=lambda entry: -entry[1])
        top = tuple((self._token_text(other), value) for other, value in ordered)
        text = self._token_text(token)
        self._logprobs.append(TokenLogprob(text, finite[token], top, self._offset))
        self._offset += len(text)

    def _token_text(self, token: int) -> str:
        """Return what a token adds to the text: a decoder may drop the space before a token that stands alone."""
        before, after = self._tokenizer.decode(self.tokens[-1:]), self._tokenizer.decode([*self.tokens[-1:], token])
        return after.removeprefix(before) if after.startswith(before) else self._tokenizer.decode([token])

    def _finish(self, reason: FinishReason) -> None:
        self._text.finish(self.tokens)
        self.finish_reason = "stop" if self._text.stopped else reason
        self._send(self._text.take(finished=True))

    def _send(self, text: str) -> None:
        self.text += text
        logprobs = None if self.decoding.logprobs is None else tuple(self._logprobs)
        self._logprobs = []
        self.job.send(Piece(text, self.finish_reason, len(self.tokens), logprobs))


def _end_ids(text_to_text: TextToText) -> set[int]:
    """Return the ids that end an output: the tokenizer's end token, and those at which `generate()` stops."""
    ids = getattr(getattr(text_to_text.model, "generation_config", None), "eos_token_id", None)
    found = [*(ids if isinstance(ids, list) else [ids]), text_to_text.tokenizer.eos_token_id]
    return {int(token) for token in found if token is not None}
