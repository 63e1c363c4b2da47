"""Decode the text of an output while its tokens arrive."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


INCOMPLETE_CHARACTER = "\ufffd"  # a decoder writes it for the first bytes of a character


class TextStream:
    """
    Decodes an output token by token, without its special tokens, and cuts it before a stop text.

    The pieces that [`~TextStream.take`] returns, joined, equal the decoded output, cut before the first stop text.

    Args:
        tokenizer: The tokenizer of the outputs. One that decodes in Python decodes the whole output at each token.
        stop: The output ends before the first of these texts.

    Attributes:
        stopped: Whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._text = ""
        self._taken = 0
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # The clean-up rewrites text that was decoded before, and the backend does not do it.
        incremental = isinstance(backend, Tokenizer) and not tokenizer.clean_up_tokenization_spaces
        self._backend = backend if incremental else None
        self._decode_stream = DecodeStream(skip_special_tokens=True)

    def add(self, tokens: Sequence[int]) -> None:
        """Decode the last of `tokens`, the output so far; call it once for each token."""
        if self._backend is None:
            self._set(self._decode(tokens))
        else:
            self._set(self._text + (self._decode_stream.step(self._backend, tokens[-1]) or ""))

    def finish(self, tokens: Sequence[int]) -> None:
        """Decode all `tokens` of a finished output, an incomplete character at the end included."""
        self._set(self._decode(tokens))

    def take(self, finished: bool = False) -> str:
        """Return the text that no later token can change and that was not returned before."""
        end = len(self._text) if finished else self._settled()
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _set(self, text: str) -> None:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        self._text = text[: min(places)] if places else text

    def _settled(self) -> int:
        """Return the length of the text that stays, whatever comes next: a stop text may have begun at its end."""
        text = self._text
        begun = [
            size
            for stop in self._stop
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        kept = len(text) - max(begun, default=0)
        if self._backend is None:  # a character may be incomplete; the clean-up may remove white space
            kept = min(kept, len(text.rstrip(INCOMPLETE_CHARACTER).rstrip()))
        return kept


class StreamedText(BaseStreamer):
    """
    The text of one output, which one thread generates and another one reads by iterating. The thread that generates
    passes it to `generate()` as the streamer, and `stopping` as a stopping criterion.

    Args:
        tokenizer: The tokenizer of the output.
    """

    def __init__(self, tokenizer: Any):
        self.stopping = _Stopping()
        self._text = TextStream(tokenizer)
        self._tokens: list[int] | None = None
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces.get, None)

    def stop(self) -> None:
        """Stop generating at the next token."""
        self.stopping.stopped = True

    def put(self, value: torch.Tensor) -> None:
        """Hook of `generate()`: decode new tokens. The first call holds the tokens before the output."""
        if self._tokens is None:
            self._tokens = []
            return
        for token in value.flatten().tolist():
            self._tokens.append(token)
            self._text.add(self._tokens)
        self._send(self._text.take())

    def end(self) -> None:
        """Hook of `generate()`: send the rest of the text."""
        self._text.finish(self._tokens or [])
        self._send(self._text.take(finished=True))
        self._pieces.put(None)

    def _send(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)


class _Stopping(StoppingCriteria):
    """Ends all outputs once `stopped` is set."""

    stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)
