"""
Prompts that arrive while others are answered: one thread answers what waits in batches, and each answer goes out token
by token, ends where its own request says, and is finished when it is done and not when its batch is.

The loop is stock `generate()`: a stopping criterion sees every new token of every row, and a logits processor draws
for the rows that are sampled, each from a generator of its own. So a prompt is answered as it would be alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..inference.text_to_text import TextToText


logger = logging.getLogger(__name__)

HALF_A_CHARACTER = "\ufffd"  # what the first bytes of a character are decoded to


@dataclass(frozen=True)
class Decoding:
    """
    How an answer is written.

    Args:
        max_tokens: It ends after this many tokens.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Of sampling: draw from the likeliest tokens that have this probability together.
        seed: Makes a sampled answer repeatable.
        stop: It ends before the first of these texts.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """
    A part of an answer.

    Args:
        text: What comes next.
        finish_reason: `"stop"` or `"length"` of the last part, else None.
        tokens: The number of tokens so far, the end token included.
    """

    text: str
    finish_reason: str | None = None
    tokens: int = 0


class Job:
    """
    A prompt that is to be answered.

    Args:
        ids: Its token ids.
        decoding: How.
        send: Called in the batcher's thread with each [`Piece`], or with the exception that ended the work.
        stream: Send pieces as they come; else the whole answer in one.
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

    def cancel(self) -> None:
        """Says that nobody waits for the answer any more."""
        self.cancelled = True


class QueueFull(Exception):
    """There is no room for more prompts."""


class Batcher:
    """
    Answers prompts in a thread of its own, those that arrive together in one batch.

    Args:
        text_to_text: The model; nobody else may use it meanwhile.
        max_batch: At most this many prompts in a batch.
        max_wait: Seconds that a batch waits for more prompts.
        max_queue: At most this many prompts wait.
        num_beams: Of all answers; above 1 answers come whole, and only those of one length limit share a batch.

    Attributes:
        running: The number of prompts that are being answered.
        prompts: The number of prompts answered so far.
        failed: The number of prompts that the model failed at so far.
        tokens: The number of tokens written so far.
        batches: The number of batches so far.
    """

    def __init__(
        self,
        text_to_text: TextToText,
        max_batch: int = 16,
        max_wait: float = 0.005,
        max_queue: int = 64,
        num_beams: int = 1,
    ):
        self.text_to_text = text_to_text
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.num_beams = num_beams
        self.running = self.prompts = self.failed = self.tokens = self.batches = 0
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._batch: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def __len__(self) -> int:
        """The number of prompts that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Gives up what is not finished, at the next token, and ends the thread."""
        with self._changed:
            self._stopping = True
            for job in (*self._waiting, *self._batch):
                job.cancel()
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of some jobs, or raises [`QueueFull`]."""
        with self._changed:
            self._drop_cancelled()
            if self._stopping or len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)
            self._batch, self.running = [], 0

    def _take(self) -> list[Job]:
        """The next batch, as soon as it is full or its time is over; empty at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                deadline = time.monotonic() + self.max_wait
                while len(self._waiting) < self.max_batch and not self._stopping:
                    if not self._changed.wait(deadline - time.monotonic()):
                        break
                if self._stopping:
                    return []
                self._drop_cancelled()
                batch: list[Job] = []
                for job in self._waiting:
                    if len(batch) < self.max_batch and self._go_together([*batch, job]):
                        batch.append(job)
                self._waiting = [job for job in self._waiting if job not in batch]
                if batch:
                    self._batch, self.running = batch, len(batch)
                    return batch

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.cancelled]

    def _go_together(self, jobs: list[Job]) -> bool:
        """Whether jobs may share a batch, which is as wide as the longest prompt and as long as the longest answer."""
        limits = [job.decoding.max_tokens for job in jobs]
        if self.num_beams > 1 and len(set(limits)) > 1:
            return False
        try:
            self.text_to_text.check_positions(max(len(job.ids) for job in jobs), max(limits))
        except ValueError:
            return len(jobs) == 1  # to be refused where it is answered
        return True

    def _answer(self, jobs: list[Job]) -> None:
        answers = [_Answer(job, self.text_to_text) for job in jobs]
        try:
            self._generate(answers)
        except Exception as error:
            unsaid = [answer.job for answer in answers if not answer.tokens]
            if len(jobs) > 1 and len(unsaid) == len(jobs):  # one of them spoils the others
                for job in jobs:
                    self._answer([job])
                return
            logger.warning("A batch of %d prompts failed.", len(jobs), exc_info=error)
            for answer in answers:
                if not answer.finish_reason:
                    answer.job.send(error)
                    self.failed += 1
        self.batches += 1
        self.prompts += sum(answer.finish_reason is not None for answer in answers)
        self.tokens += sum(len(answer.tokens) for answer in answers)

    def _generate(self, answers: list[_Answer]) -> None:
        jobs = [answer.job for answer in answers]
        features = {
            "input_ids": [job.ids for job in jobs],
            "attention_mask": [[1] * len(job.ids) for job in jobs],
        }
        rows = self.text_to_text.write(
            self.text_to_text.read(features),
            max_new_tokens=max(job.decoding.max_tokens for job in jobs),
            num_beams=self.num_beams,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_EachRow(answers, by_step=self.num_beams == 1)]),
            logits_processor=LogitsProcessorList([_Draw(answers)]),
        )
        if self.num_beams > 1:
            for answer, ids in zip(answers, rows, strict=True):
                answer.take_all(ids)


class _Answer:
    """One row of a batch: its tokens so far, and how much of its text was sent."""

    def __init__(self, job: Job, text_to_text: TextToText):
        self.job = job
        self.decoding = job.decoding
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.generator: torch.Generator | None = None
        self._tokenizer = text_to_text.tokenizer
        self._ends = _end_ids(text_to_text)
        self._sent = 0

    @property
    def done(self) -> bool:
        return self.job.cancelled or self.finish_reason is not None

    def take(self, token: int) -> None:
        """Adds a token, and sends what is certain now."""
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.decoding.max_tokens:
            self.finish_reason = "length"
        if not (self.finish_reason or self.job.stream or self.decoding.stop):
            return
        text = self._text()
        end = len(text) if self.finish_reason else self._certain(text)
        if self.finish_reason or (self.job.stream and end > self._sent):
            self.job.send(Piece(text[self._sent : end], self.finish_reason, len(self.tokens)))
            self._sent = end

    def take_all(self, tokens: Sequence[int]) -> None:
        """Adds all tokens at once, and sends all of the text."""
        self.tokens = list(tokens)
        ended = any(token in self._ends for token in tokens) or len(tokens) < self.decoding.max_tokens
        self.finish_reason = "stop" if ended else "length"
        self.job.send(Piece(self._text(), self.finish_reason, len(tokens)))

    def _text(self) -> str:
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        found = [place for stop in self.decoding.stop if (place := text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            return text[: min(found)]
        return text

    def _certain(self, text: str) -> int:
        """
        How much of a text no later token changes: a character may not be whole yet, white space may be taken back
        before punctuation, and a text to stop at may have begun.
        """
        begun = [
            size
            for stop in self.decoding.stop
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return min(len(text.rstrip(HALF_A_CHARACTER).rstrip()), len(text) - max(begun, default=0))


class _EachRow(StoppingCriteria):
    """Hands each row of a batch its new token, and stops the rows that are done."""

    def __init__(self, answers: list[_Answer], by_step: bool):
        self.answers = answers
        self.by_step = by_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.by_step:  # beams: rows are not answers
            gone = all(answer.done for answer in self.answers)
            return torch.full((input_ids.shape[0],), gone, device=input_ids.device)
        for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True):
            if not answer.done:
                answer.take(token)
        return torch.tensor([answer.done for answer in self.answers], device=input_ids.device)


class _Draw(LogitsProcessor):
    """Leaves one token, drawn from a generator of its own, to each row that is sampled."""

    def __init__(self, answers: list[_Answer]):
        self.answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sampled = [row for row, answer in enumerate(self.answers) if answer.decoding.temperature and not answer.done]
        if not sampled:
            return scores
        scores = scores.clone()
        for row in sampled:
            token = _draw(self.answers[row], input_ids[row : row + 1], scores[row : row + 1])
            scores[row] = -torch.inf
            scores[row, token] = 0
        return scores


def _draw(answer: _Answer, ids: torch.Tensor, scores: torch.Tensor) -> int:
    decoding = answer.decoding
    if answer.generator is None:
        answer.generator = torch.Generator(scores.device)
        if decoding.seed is None:
            answer.generator.seed()
        else:
            answer.generator.manual_seed(decoding.seed)
    scores = TemperatureLogitsWarper(float(decoding.temperature))(ids, scores)
    if decoding.top_p < 1:
        scores = TopPLogitsWarper(float(decoding.top_p))(ids, scores)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=answer.generator))


def _end_ids(text_to_text: TextToText) -> set[int]:
    """Ids that end an answer: the tokenizer's end token, and those at which `generate()` stops."""
    ids = getattr(getattr(text_to_text.model, "generation_config", None), "eos_token_id", None)
    found = [*(ids if isinstance(ids, list) else [ids]), text_to_text.tokenizer.eos_token_id]
    return {int(token) for token in found if token is not None}
