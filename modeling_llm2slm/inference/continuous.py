"""The interface of a model that takes prompts into a batch that is being generated (continuous batching)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple


class Generated(NamedTuple):
    """
    The tokens so far of one output.

    Args:
        request: What [`~ContinuousTextToText.add`] returned.
        sample: The number of the output among those of its request.
        tokens: Its token ids, the end token included.
        finish_reason: `"stop"` at an end token or a stop text, `"length"` at the limit; `None` while it continues.
        logprobs: For each token, the log-probabilities by token id; `None` unless they were asked for.
        error: Why the request failed. It has no other outputs.
    """

    request: str
    sample: int = 0
    tokens: Sequence[int] = ()
    finish_reason: str | None = None
    logprobs: Any = None
    error: Exception | None = None


class ContinuousTextToText(ABC):
    """The part of a [`TextToText`] that batches continuously. One thread adds requests and steps."""

    @abstractmethod
    def sampling(self, seed: int | None = None, logprobs: int | None = None, **generate_kwargs: Any) -> Any:
        """Return the engine's own settings for arguments of `generate()`; `ValueError` for those it does not have."""

    @abstractmethod
    def add(self, ids: Sequence[int], sampling: Any) -> str:
        """Add a prompt, given by its token ids, and return the id of the request."""

    @abstractmethod
    def step(self) -> list[Generated]:
        """
        Compute one step of all requests that are being generated, while new prompts are read.

        Returns:
            The outputs that have a new token, are finished or have failed. The list may be empty.
        """

    @abstractmethod
    def abort(self, requests: Sequence[str]) -> None:
        """Drop requests, finished or not."""
