"""
Generate for prompts that arrive at any time: one thread takes those that wait and generates for them in a batch. An
engine with continuous batching takes them into the batch that runs.

Each output is sent token by token, ends where its own request says, and is finished as soon as it is complete: it does
not wait for its batch. The loop is stock `generate()`: a stopping criterion sees every new token of every row, and a
logits processor samples for the rows that ask for it, each with its own generator. So each output equals the one that
its prompt gets alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..inference.continuous import ContinuousTextToText
from ..inference.outputs import BlankOutputs
from ..inference.text_stream import TextStream
from ..inference.text_to_text import TextToText
from ..settings import ServeSettings


logger = logging.getLogger(__name__)

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
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """
    A part of an output.

    Args:
        text: The text that comes next.
        finish_reason: Why the output ends, in the last piece; else None.
        tokens: The number of tokens so far, the end token included.
    """

    text: str
    finish_reason: FinishReason | None = None
    tokens: int = 0


class Job:
    """
    A prompt to generate for.

    Args:
        ids: Its token ids.
        decoding: How to generate.
        send: Called in the batcher's thread with each [`Piece`], or with the exception that ended the generation.
        stream: Whether to send pieces as they are generated. Otherwise the whole output is one piece.
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
        """Stop generating: nobody waits for the output any more."""
        self.cancelled = True


class QueueFull(Exception):
    """The queue cannot take the jobs."""


class Batcher:
    """
    Generates in a thread of its own, for prompts that arrive together in one batch.

    Args:
        text_to_text: The model. Only the batcher may use it.
        settings: Its `max_batch`, `max_wait`, `max_queue` and `num_beams`. With beams, each output is sent whole, and
            a batch holds only prompts with the same `max_tokens`.

    Attributes:
        running: The number of prompts in the batch that is being generated.
        prompts: The number of outputs finished so far.
        failed: The number of prompts so far that the model failed on.
        tokens: The number of tokens generated so far.
        batches: The number of batches so far.
    """

    def __init__(self, text_to_text: TextToText, settings: ServeSettings | None = None):
        self.text_to_text = text_to_text
        self.settings = settings or ServeSettings()
        self.running = self.prompts = self.failed = self.tokens = self.batches = 0
        self._blank = BlankOutputs()
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._batch: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def __len__(self) -> int:
        """The number of prompts that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Abandon unfinished outputs at their next token, and end the thread."""
        with self._changed:
            self._stopping = True
            for job in (*self._waiting, *self._batch):
                job.cancel()
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs, or raise [`QueueFull`] and queue none."""
        with self._changed:
            self._drop_cancelled()
            if self._stopping or len(self._waiting) + len(jobs) > self.settings.max_queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._run(batch)
            self._batch, self.running = [], 0

    def _next_batch(self) -> list[Job]:
        """Return the next batch, as soon as it is full or `max_wait` is over; at the end, an empty one."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                deadline = time.monotonic() + self.settings.max_wait / 1000
                while len(self._waiting) < self.settings.max_batch and not self._stopping:
                    if not self._changed.wait(deadline - time.monotonic()):
                        break
                if self._stopping:
                    return []
                self._drop_cancelled()
                batch: list[Job] = []
                for job in self._waiting:
                    if len(batch) < self.settings.max_batch and self._fit([*batch, job]):
                        batch.append(job)
                self._waiting = [job for job in self._waiting if job not in batch]
                if batch:
                    self._batch, self.running = batch, len(batch)
                    return batch

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.cancelled]

    def _fit(self, jobs: list[Job]) -> bool:
        """Return whether jobs fit in a batch, as wide as its longest prompt and as long as its longest output."""
        limits = [job.decoding.max_tokens for job in jobs]
        if self.settings.num_beams > 1 and len(set(limits)) > 1:
            return False
        try:
            self.text_to_text.check_positions(max(len(job.ids) for job in jobs), max(limits))
        except ValueError:
            return len(jobs) == 1  # generate() raises the same error, and the job's client gets it
        return True

    def _run(self, jobs: list[Job]) -> None:
        completions = [_Completion(job, self.text_to_text) for job in jobs]
        try:
            self._generate(completions)
        except Exception as error:
            if len(jobs) > 1 and not any(completion.tokens for completion in completions):
                for job in jobs:  # one prompt must not fail the others
                    self._run([job])
                return
            logger.warning("A batch of %d prompts failed.", len(jobs), exc_info=error)
            for completion in completions:
                if not completion.finish_reason:
                    completion.job.send(error)
                    self.failed += 1
        self.batches += 1
        self.prompts += sum(completion.finish_reason is not None for completion in completions)
        self.tokens += sum(len(completion.tokens) for completion in completions)
        self._warn_of_blank([completion.text for completion in completions if completion.finish_reason])

    def _warn_of_blank(self, outputs: list[str]) -> None:
        """Log the number of blank outputs at the first one, the tenth, the hundredth and so on."""
        before = len(str(self._blank.blank or ""))
        self._blank.count(outputs)
        if len(str(self._blank.blank or "")) > before:
            self._blank.warn()

    def _generate(self, completions: list[_Completion]) -> None:
        jobs = [completion.job for completion in completions]
        features = {
            "input_ids": [job.ids for job in jobs],
            "attention_mask": [[1] * len(job.ids) for job in jobs],
        }
        with_beams = self.settings.num_beams > 1
        outputs = self.text_to_text.write(
            self.text_to_text.read(features),
            max_new_tokens=max(job.decoding.max_tokens for job in jobs),
            num_beams=self.settings.num_beams,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_EachRow(completions, with_beams)]),
            logits_processor=LogitsProcessorList([_SampleRows(completions)]),
        )
        if with_beams:
            for completion, ids in zip(completions, outputs, strict=True):
                completion.set_tokens(ids)


class ContinuousBatcher(Batcher):
    """
    Generates with an engine that takes prompts into the running batch, see [`ContinuousTextToText`]. `max_batch`
    limits the prompts that run, `max_wait` has no effect, and `batches` counts how often prompts were added.
    """

    text_to_text: Any

    def __init__(self, text_to_text: Any, settings: ServeSettings | None = None):
        super().__init__(text_to_text, settings)
        if self.settings.num_beams > 1:
            raise ValueError("num_beams is above 1, which this engine does not support: leave it out.")
        self._running: dict[str, _Completion] = {}

    def _work(self) -> None:
        while not self._stopping:
            try:
                self._admit(self._arrived())
                self._step()
            except Exception as error:
                logger.warning("A batch of %d prompts failed.", len(self._running), exc_info=error)
                for completion in self._running.values():
                    completion.job.send(error)
                self.failed += len(self._running)
                self._forget(list(self._running))
        self._forget(list(self._running))

    def _arrived(self) -> list[Job]:
        """Return the jobs that fit into the running batch; wait for one if nothing runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            self._drop_cancelled()
            free = 0 if self._stopping else self.settings.max_batch - len(self._running)
            jobs, self._waiting = self._waiting[:free], self._waiting[free:]
            return jobs

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Add jobs to the running batch."""
        for job in jobs:
            try:
                request = self.text_to_text.add(job.ids, self._sampling(job.decoding))
            except ValueError as error:
                job.send(error)
                self.failed += 1
            else:
                self._running[request] = _Completion(job, self.text_to_text)
        self.batches += bool(jobs)
        self._batch, self.running = [completion.job for completion in self._running.values()], len(self._running)

    def _sampling(self, decoding: Decoding) -> Any:
        sampled = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        return self.text_to_text.sampling(
            decoding.seed,
            max_new_tokens=decoding.max_tokens,
            **(sampled if decoding.temperature else {"do_sample": False}),
        )

    def _step(self) -> None:
        if not self._running:
            return
        for one in self.text_to_text.step():
            completion = self._running[one.request]
            if one.error is not None:
                completion.job.send(one.error)
                completion.job.cancel()
                self.failed += 1
            for token in one.tokens[len(completion.tokens) :]:
                if not completion.done:
                    completion.add_token(token)
        self._forget([request for request, completion in self._running.items() if completion.done])

    def _forget(self, requests: Sequence[str]) -> None:
        """Count finished requests, and drop them and those that nobody waits for."""
        self.text_to_text.abort(requests)
        done = [self._running.pop(request) for request in requests]
        self.prompts += sum(completion.finish_reason is not None for completion in done)
        self.tokens += sum(len(completion.tokens) for completion in done)
        self._batch, self.running = [completion.job for completion in self._running.values()], len(self._running)


def batcher_for(text_to_text: TextToText, settings: ServeSettings) -> Batcher:
    """Return the batcher that suits a model."""
    kind = ContinuousBatcher if isinstance(text_to_text, ContinuousTextToText) else Batcher
    return kind(text_to_text, settings)


class _Completion:
    """The output of one row of a batch: its tokens so far, and their text."""

    def __init__(self, job: Job, text_to_text: TextToText):
        self.job = job
        self.decoding = job.decoding
        self.tokens: list[int] = []
        self.text = ""  # as far as it was sent
        self.finish_reason: FinishReason | None = None
        self.generator: torch.Generator | None = None
        self._text = TextStream(text_to_text.tokenizer, job.decoding.stop)
        self._end_ids = _end_ids(text_to_text)

    @property
    def done(self) -> bool:
        return self.job.cancelled or self.finish_reason is not None

    def add_token(self, token: int) -> None:
        """Add a token, and send the text that can no longer change."""
        self.tokens.append(token)
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

    def _finish(self, reason: FinishReason) -> None:
        self._text.finish(self.tokens)
        self.finish_reason = "stop" if self._text.stopped else reason
        self._send(self._text.take(finished=True))

    def _send(self, text: str) -> None:
        self.text += text
        self.job.send(Piece(text, self.finish_reason, len(self.tokens)))


class _EachRow(StoppingCriteria):
    """Gives each completion of a batch its new token, and stops the rows that are done."""

    def __init__(self, completions: list[_Completion], with_beams: bool):
        self.completions = completions
        self.with_beams = with_beams

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.with_beams:  # rows are beams: a token in one may not be in the output
            all_done = all(completion.done for completion in self.completions)
            return torch.full((input_ids.shape[0],), all_done, device=input_ids.device)
        for completion, token in zip(self.completions, input_ids[:, -1].tolist(), strict=True):
            if not completion.done:
                completion.add_token(token)
        return torch.tensor([completion.done for completion in self.completions], device=input_ids.device)


class _SampleRows(LogitsProcessor):
    """Samples a token for each row with a temperature, and leaves only this token to `generate()`, which is greedy."""

    def __init__(self, completions: list[_Completion]):
        self.completions = completions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sampled = [
            row
            for row, completion in enumerate(self.completions)
            if completion.decoding.temperature and not completion.done
        ]
        if not sampled:
            return scores
        scores = scores.clone()
        for row in sampled:
            token = _sample(self.completions[row], input_ids[row : row + 1], scores[row : row + 1])
            scores[row] = -torch.inf
            scores[row, token] = 0
        return scores


def _sample(completion: _Completion, ids: torch.Tensor, scores: torch.Tensor) -> int:
    decoding = completion.decoding
    if completion.generator is None:
        completion.generator = torch.Generator(scores.device)
        if decoding.seed is None:
            completion.generator.seed()
        else:
            completion.generator.manual_seed(decoding.seed)
    scores = TemperatureLogitsWarper(float(decoding.temperature))(ids, scores)
    if decoding.top_p < 1:
        scores = TopPLogitsWarper(float(decoding.top_p))(ids, scores)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=completion.generator))


def _end_ids(text_to_text: TextToText) -> set[int]:
    """Return the ids that end an output: the tokenizer's end token, and those at which `generate()` stops."""
    ids = getattr(getattr(text_to_text.model, "generation_config", None), "eos_token_id", None)
    found = [*(ids if isinstance(ids, list) else [ids]), text_to_text.tokenizer.eos_token_id]
    return {int(token) for token in found if token is not None}
