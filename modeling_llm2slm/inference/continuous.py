"""The interface of a model that takes prompts into a batch that is being generated (continuous batching)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Generated(NamedTuple):
    """
    The tokens so far of one output.

    Args:
        request: What [`~ContinuousTextToText.add`] returned.
        sample: The number of the output among those of its request.
        tokens: Its token ids, the end token included.
        finish_reason: `"stop"` at an end token, `"length"` at the limit; `None` while it continues.
        logprobs: For each token, the log-probabilities by token id; `None` unless they were asked for.
    """

    request: str
    sample: int
    tokens: Sequence[int]
    finish_reason: str | None
    logprobs: Any = None


class ContinuousTextToText(ABC):
    """The part of a [`TextToText`] that batches continuously. One thread adds requests and steps."""

    @abstractmethod
    def rows(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return one item for each prompt in the result of [`~TextToText.read`], to be passed to `add`."""

    @abstractmethod
    def sampling(self, seed: int | None = None, logprobs: int | None = None, **generate_kwargs: Any) -> Any:
        """Return the engine's own settings for arguments of `generate()`; `ValueError` for those it does not have."""

    @abstractmethod
    def add(self, rows: Any, sampling: Any) -> str:
        """Add a prompt to the running batch, and return the id of the request."""

    @abstractmethod
    def step(self) -> list[Generated]:
        """Compute one step of all requests; return the outputs that have a new token or are finished."""

    @abstractmethod
    def abort(self, requests: Sequence[str]) -> None:
        """Drop requests, finished or not."""
