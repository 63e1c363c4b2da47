"""Responses as OpenAI's clients read them: whole ones, events of streams, models and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, model_serializer
from starlette.exceptions import HTTPException

from .jobs import FinishReason, Piece, TokenLogprob


class Usage(BaseModel):
    """Token counts of a request, summed over its prompts and outputs. End tokens are included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a completion, before temperature and top-p."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """An output, or a piece of it: `index` counts the outputs of the first prompt, then those of the next."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class TopLogprob(BaseModel):
    """A likely token in the place of a token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of an output."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a message, before temperature and top-p."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The message that the model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """A whole output."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class Delta(BaseModel):
    """What an event adds to a message; the first event of an output has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _only_what_is_added(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(BaseModel):
    """A piece of an output."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class Response(BaseModel):
    """The fields that all responses have."""

    id: str
    created: int
    model: str
    usage: Usage | None = None

    def json_text(self) -> str:
        """Return the response as JSON, without `usage` where it is not known yet."""
        return self.model_dump_json(exclude={"usage"} if self.usage is None else None)


class Completion(Response):
    """A response of `/v1/completions`, or one event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(Response):
    """A response of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatCompletionChunk(Response):
    """An event of a stream of `/v1/chat/completions`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "modeling-llm2slm"


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    """What is wrong: one sentence that names the fix, and the field of the request."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: None = None


class ErrorResponse(BaseModel):
    """The body of a response whose status is 400 or above."""

    error: Error


class CompletionForm:
    """
    The form of outputs in `/v1/completions`.

    Args:
        echoes: The text before each output, by its index.
    """

    prefix, whole, event = "cmpl", Completion, Completion

    def __init__(self, echoes: Sequence[str]):
        self.echoes = echoes

    def choice(self, index: int, piece: Piece) -> CompletionChoice:
        """Return a whole output."""
        (choice,) = self.pieces(index, piece)
        return choice.model_copy(update={"text": self.echoes[index] + choice.text})

    def opening(self, index: int) -> list[CompletionChoice]:
        """Return the pieces that begin an output in a stream."""
        return [CompletionChoice(index=index, text=self.echoes[index])] if self.echoes[index] else []

    def pieces(self, index: int, piece: Piece) -> list[CompletionChoice]:
        """Return a piece of an output in a stream."""
        logprobs = None if piece.logprobs is None else _logprobs(piece.logprobs)
        return [CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason)]


class ChatForm:
    """The form of outputs in `/v1/chat/completions`."""

    prefix, whole, event = "chatcmpl", ChatCompletion, ChatCompletionChunk

    def choice(self, index: int, piece: Piece) -> ChatChoice:
        """Return a whole output."""
        message = ChatMessage(content=piece.text)
        return ChatChoice(
            index=index, message=message, logprobs=_chat_logprobs(piece), finish_reason=piece.finish_reason
        )

    def opening(self, index: int) -> list[ChunkChoice]:
        """Return the piece that begins an output in a stream, with its role."""
        return [ChunkChoice(index=index, delta=Delta(role="assistant", content=""))]

    def pieces(self, index: int, piece: Piece) -> list[ChunkChoice]:
        """Return a piece of an output in a stream; the reason of its end comes alone."""
        logprobs, found = _chat_logprobs(piece), []
        if piece.text or piece.logprobs:
            found.append(ChunkChoice(index=index, delta=Delta(content=piece.text), logprobs=logprobs))
        if piece.finish_reason:
            found.append(ChunkChoice(index=index, delta=Delta(), finish_reason=piece.finish_reason))
        return found


Form = CompletionForm | ChatForm


def error_content(error: HTTPException) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    kind: Any = "invalid_request_error" if error.status_code < 500 else "server_error"
    found = Error(message=error.detail, type=kind, param=getattr(error, "param", None))
    return ErrorResponse(error=found).model_dump()


def _logprobs(tokens: Sequence[TokenLogprob]) -> Logprobs:
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_by_text(token.top) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def _by_text(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text, logprob in top:  # likeliest first, so of two tokens with one text it is the likelier one
        found.setdefault(text, logprob)
    return found


def _chat_logprobs(piece: Piece) -> ChatLogprobs | None:
    if piece.logprobs is None:
        return None
    return ChatLogprobs(
        content=[
            ChatLogprob(
                **_entry(token.text, token.logprob), top_logprobs=[TopLogprob(**_entry(*each)) for each in token.top]
            )
            for token in piece.logprobs
        ]
    )


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
