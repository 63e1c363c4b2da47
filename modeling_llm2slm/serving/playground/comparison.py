"""Generate for one prompt with the LLM-to-SLM model and with its LLM, one after the other, and measure both."""

from __future__ import annotations

import copy
import queue
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...inference.text_to_text import TextToText
from ...settings import ServeSettings
from ..app import Service
from ..jobs import Decoding, Job, Piece
from ..scheduler import Batcher, QueueFull, batcher_for
from .llm import ComparedLLM


LLM2SLM, LLM = "LLM-to-SLM", "LLM"
TICK = 0.1  # seconds between two looks at an output
STOPPED = "The server is being stopped. Start it again."


@dataclass(frozen=True)
class Progress:
    """
    An output so far.

    Args:
        text: Its text.
        tokens: The number of its tokens, the end token included.
        seconds: The time since the model began to read the prompt.
        stages: Seconds by stage, once the output is finished.
        finished: Whether it is finished.
        error: Why the model generates nothing; empty if it does.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    finished: bool = False
    error: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, over the whole time."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Contestant:
    """
    A model that generates for one prompt at a time and is measured. Other requests may share its batches.

    Args:
        text_to_text: The model. Its `read` is replaced by one that takes the time.
        batcher: Generates with it.
        max_prompt_tokens: Longest prompt, in tokens.
    """

    def __init__(self, text_to_text: TextToText, batcher: Batcher, max_prompt_tokens: int):
        self.text_to_text = text_to_text
        self.batcher = batcher
        self.max_prompt_tokens = max_prompt_tokens
        # Two threads must not use a tokenizer at the same time.
        self._reader = text_to_text.without_model()
        self._reader.processor = copy.deepcopy(text_to_text.processor)
        self._reader.tokenizer = getattr(self._reader.processor, "decoder_tokenizer", self._reader.processor)
        self._read = _Timed(text_to_text, "read")
        encoder = getattr(text_to_text.model, "encoder", None)
        self._llm = _Timed(encoder, "run_llm") if hasattr(encoder, "run_llm") else None
        self._encodes_first = text_to_text.model.config.is_encoder_decoder
        self._is_warm = False

    def generate(self, prompt: str, decoding: Decoding) -> Iterator[Progress]:
        """
        Yield the output at least ten times a second, and once more when it is finished. Before its first output, the
        model generates two tokens, which nobody sees: a first call takes longer than all others.

        Raises:
            ValueError: If the prompt is empty or too long.
            QueueFull: If too many other prompts wait.
            RuntimeError: If the model fails, or the server is being stopped.
        """
        ids = self._reader.features([prompt])["input_ids"][0]
        if not ids or not prompt.strip():
            raise ValueError("The prompt is empty. Type one.")
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(f"The prompt has {len(ids)} tokens, but at most {self.max_prompt_tokens} are allowed.")
        self._reader.check_positions(len(ids), decoding.max_tokens)
        if not self._is_warm:
            yield Progress()
            for _ in self._run(ids, Decoding(min(2, decoding.max_tokens))):
                pass
            self._is_warm = True
        yield from self._run(ids, decoding)

    def _run(self, ids: list[int], decoding: Decoding) -> Iterator[Progress]:
        arrived: queue.SimpleQueue[tuple[Piece | Exception, float, _Laps]] = queue.SimpleQueue()

        def send(piece: Piece | Exception) -> None:  # called by the thread that generates: the last lap is this one's
            arrived.put((piece, time.perf_counter(), self._laps()))

        job = Job(ids, decoding, send, stream=True)
        start = shown = time.perf_counter()
        laps: _Laps | None = None
        text, tokens = "", 0
        self.batcher.submit([job])
        try:
            while True:
                try:
                    piece, now, laps_of_piece = arrived.get(timeout=TICK)
                except queue.Empty:
                    if job.cancelled:
                        raise RuntimeError(STOPPED) from None
                    now = time.perf_counter()
                else:
                    if isinstance(piece, Exception):
                        raise RuntimeError(f"The model failed: {' '.join(str(piece).split())}")
                    laps = laps or laps_of_piece
                    text, tokens = text + piece.text, piece.tokens
                    if piece.finish_reason is not None:
                        seconds = now - laps.start
                        yield Progress(text, tokens, seconds, self._stages(laps, seconds), finished=True)
                        return
                if now - shown >= TICK:
                    shown = now
                    yield Progress(text, tokens, now - (laps.start if laps else start))
        finally:
            job.cancel()

    def _laps(self) -> _Laps:
        return _Laps(self._read.start, self._read.seconds, self._llm.seconds if self._llm else None)

    def _stages(self, laps: _Laps, seconds: float) -> dict[str, float]:
        """Return seconds by stage. A decoder-only LLM reads the prompt in the step of the first token."""
        if not self._encodes_first:
            return {"prompt and decoding": seconds}
        decoding = {"decoding": max(seconds - laps.read, 0.0)}
        if laps.llm is not None:
            return {"LLM encoding": laps.llm, "projection": max(laps.read - laps.llm, 0.0), **decoding}
        return {"LLM encoding and projection" if self.text_to_text.is_llm2slm else "encoding": laps.read, **decoding}


class Comparison:
    """
    The models of a page, which take turns: side by side, each would slow the other down.

    Args:
        service: The server of the LLM-to-SLM model.
        llm: Its LLM.

    Attributes:
        contestants: The models by name, in the order of their turns.
        reason: Why the LLM is missing; empty if it is there.
    """

    def __init__(self, service: Service, llm: ComparedLLM):
        self.service = service
        self.reason = llm.reason
        longest = service.max_prompt_tokens
        self.contestants = {LLM2SLM: Contestant(service.text_to_text, service.batcher, longest)}
        self._batcher: Batcher | None = None
        if llm.text_to_text is not None:
            settings = ServeSettings(max_wait=0, num_beams=service.settings.num_beams)
            self._batcher = batcher_for(llm.text_to_text, settings)
            self.contestants[LLM] = Contestant(llm.text_to_text, self._batcher, longest)

    def start(self) -> None:
        """Start to generate with the LLM."""
        if self._batcher is not None:
            self._batcher.start()

    def stop(self) -> None:
        """Abandon unfinished outputs of the LLM."""
        if self._batcher is not None:
            self._batcher.stop()

    def run(self, prompt: str, decoding: Decoding) -> Iterator[dict[str, Progress]]:
        """Yield the outputs so far, by model. One that generates nothing says why."""
        outputs: dict[str, Progress] = {}
        for name, contestant in self.contestants.items():
            try:
                for outputs[name] in contestant.generate(prompt, decoding):
                    yield dict(outputs)
            except QueueFull:
                outputs[name] = Progress(error="Too many other prompts wait. Try again later.")
            except (RuntimeError, ValueError) as error:
                outputs[name] = Progress(error=str(error))
            yield dict(outputs)


@dataclass(frozen=True)
class _Laps:
    start: float
    read: float
    llm: float | None


class _Timed:
    """Replaces a method of an object, and keeps the start and the seconds of its last call."""

    def __init__(self, holder: Any, name: str):
        self.start = self.seconds = 0.0
        self._method = getattr(holder, name)
        setattr(holder, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = self._method(*args, **kwargs)
        self.start, self.seconds = start, _now() - start
        return result


def _now() -> float:
    """Return the time at which the work that an accelerator has in its queue is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
