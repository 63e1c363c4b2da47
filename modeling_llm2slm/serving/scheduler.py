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
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from ..inference.batching import take_rows
from ..inference.continuous import ContinuousTextToText
from ..inference.outputs import BlankOutputs
from ..inference.text_to_text import Features, TextToText
from ..settings import ServeSettings
from .jobs import Completion, Decoding, Job
from .pace import Pace


logger = logging.getLogger(__name__)

TIME_FOR_WORK = 0.8  # share of a request's time limit that the work before and on it may take by estimate
LONGEST_RETRY = 60  # seconds; OpenAI's client ignores a longer Retry-After


class QueueFull(Exception):
    """
    The queue cannot take more jobs, or they would not be finished in time.

    Args:
        message: One sentence on the reason.
        retry_after: After how many seconds it is worth to try again.
    """

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


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
        self._pace = Pace()
        self._waiting: list[Job] = []
        self._entering: list[int] = []  # `max_tokens` of jobs that have their place and are not submitted yet
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

    @contextmanager
    def place(self, max_tokens: Sequence[int]) -> Iterator[None]:
        """
        Reserve places in the queue for jobs that are submitted within the context. Not thread-safe.

        Args:
            max_tokens: The longest output of each job, in tokens.

        Raises:
            QueueFull: If more than `max_queue` jobs would wait; or if, at the measured pace, some jobs would not be
                finished within `timeout`, should all outputs be as long as they may be. A job that needs not wait is
                accepted in any case.
        """
        with self._changed:
            self._drop_cancelled()
            waiting, running = len(self._waiting) + len(self._entering), self.running
            left = sum(self._entering) + sum(job.tokens_left for job in (*self._waiting, *self._batch))
        seconds = self._pace.seconds(left)
        retry_after = min(max(1, math.ceil(seconds / 2)), LONGEST_RETRY)
        if waiting + len(max_tokens) > self.settings.max_queue:
            raise QueueFull(f"{waiting} prompts are waiting.", retry_after)
        if waiting + running >= self.settings.max_batch:
            seconds = self._pace.seconds(left + sum(max_tokens))
            if seconds > TIME_FOR_WORK * self.settings.timeout:
                raise QueueFull(f"The prompts that are waiting need about {seconds:.0f} s.", retry_after)
        self._entering += max_tokens
        try:
            yield
        finally:
            for limit in max_tokens:
                self._entering.remove(limit)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, for which [`~Batcher.place`] has reserved places; raise [`QueueFull`] after the end."""
        with self._changed:
            if self._stopping:
                raise QueueFull("The server is stopping.")
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

    def _read(self, jobs: Sequence[Job]) -> tuple[Any, list[int]]:
        """Read the prompts of jobs, equal ones once; return what `read` gives, and the row of each job in it."""
        prompts = list(dict.fromkeys(tuple(job.ids) for job in jobs))
        features: Features = {
            "input_ids": [list(ids) for ids in prompts],
            "attention_mask": [[1] * len(ids) for ids in prompts],
        }
        row_of = {ids: row for row, ids in enumerate(prompts)}
        return self.text_to_text.read(features), [row_of[tuple(job.ids)] for job in jobs]

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
        completions = [Completion(job, self.text_to_text) for job in jobs]
        try:
            self._pace.start()
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

    def _generate(self, completions: list[Completion]) -> None:
        jobs = [completion.job for completion in completions]
        with_beams = self.settings.num_beams > 1
        inputs, rows = self._read(jobs)
        outputs = self.text_to_text.write(
            take_rows(inputs, rows),
            max_new_tokens=max(job.decoding.max_tokens for job in jobs),
            num_beams=self.settings.num_beams,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_EachRow(completions, self._pace, with_beams)]),
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
        self._running: dict[str, Completion] = {}

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
            self._batch = [*self._batch, *jobs]  # while their prompts are read, too
            self.running = len(self._batch)
            return jobs

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Add jobs to the running batch."""
        if jobs and not self._running:
            self._pace.start()
        for job in jobs:
            try:
                request = self.text_to_text.add(job.ids, self._sampling(job.decoding))
            except Exception as error:
                job.send(error)
                self.failed += 1
            else:
                self._running[request] = Completion(job, self.text_to_text)
        self.batches += bool(jobs)
        self._batch, self.running = [completion.job for completion in self._running.values()], len(self._running)

    def _sampling(self, decoding: Decoding) -> Any:
        sampled = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        return self.text_to_text.sampling(
            decoding.seed,
            decoding.logprobs,
            max_new_tokens=decoding.max_tokens,
            **(sampled if decoding.temperature else {"do_sample": False}),
        )

    def _step(self) -> None:
        if not self._running:
            return
        generated = self.text_to_text.step()
        self._pace.step(len(generated))
        for one in generated:
            completion = self._running[one.request]
            if one.error is not None:
                completion.job.send(one.error)
                completion.job.cancel()
                self.failed += 1
            for place in range(len(completion.tokens), len(one.tokens)):
                if not completion.done:
                    token, logprobs = one.tokens[place], one.logprobs and one.logprobs[place]
                    completion.add_token(token, logprobs and {key: each.logprob for key, each in logprobs.items()})
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


class _EachRow(StoppingCriteria):
    """Gives each completion of a batch its new token, and stops the rows that are done."""

    def __init__(self, completions: list[Completion], pace: Pace, with_beams: bool):
        self.completions = completions
        self.pace = pace
        self.with_beams = with_beams

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.pace.step(sum(not completion.done for completion in self.completions))
        if self.with_beams:  # rows are beams: a token in one may not be in the output
            all_done = all(completion.done for completion in self.completions)
            return torch.full((input_ids.shape[0],), all_done, device=input_ids.device)
        for completion, token in zip(self.completions, input_ids[:, -1].tolist(), strict=True):
            if not completion.done:
                completion.add_token(token, completion.likeliest(token))
        return torch.tensor([completion.done for completion in self.completions], device=input_ids.device)


class _SampleRows(LogitsProcessor):
    """
    Samples a token for each row with a temperature, and leaves only this token to `generate()`, which is greedy. Keeps
    the log-probabilities of the rows that ask for them.
    """

    def __init__(self, completions: list[Completion]):
        self.completions = completions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, completion in enumerate(self.completions):
            if completion.decoding.logprobs is not None and not completion.done:
                completion.scores = scores[row].log_softmax(-1)
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


def _sample(completion: Completion, ids: torch.Tensor, scores: torch.Tensor) -> int:
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
