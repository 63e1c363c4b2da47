"""Requests and responses of `POST /v1/completions`, as OpenAI's clients send and read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.exceptions import HTTPException

from ..data.parsing import parse_json
from ..settings import OUTPUT_LENGTH, TEMPERATURE, TOP_P, check_value, shown
from .scheduler import Decoding, FinishReason, Piece


NEUTRAL_VALUES: dict[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": "", "presence_penalty": 0,
    "frequency_penalty": 0, "logit_bias": {},
}  # fmt: skip
OPENAI_TEMPERATURE = {**TEMPERATURE, "maximum": 2}
HALF_A_CHARACTER = "The request contains half of a surrogate pair, which is not a character. Send whole characters."


class RequestError(HTTPException):
    """
    A request that gets no completion.

    Args:
        status: The HTTP status.
        message: One sentence that names the problem and the fix.
        param: The field of the request that is wrong.
        headers: More headers of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param


@dataclass(frozen=True)
class Limits:
    """
    Limits of the requests that a server accepts.

    Args:
        model: The name of the model.
        max_tokens: Longest output, in tokens.
        max_prompts: The number of prompts in a request.
        num_beams: The server's number of beams. Above 1, it does not sample.
    """

    model: str
    max_tokens: int
    max_prompts: int
    num_beams: int = 1


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _sentence(HALF_A_CHARACTER) from None
    return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _only_neutral(value: Any, info: ValidationInfo) -> Any:
    """Accept the value of an unsupported field that changes nothing."""
    if value is not None and value != NEUTRAL_VALUES[info.field_name or ""]:
        raise PydanticCustomError("extra_forbidden", "not supported")
    return value


def _within(**bounds: Any) -> AfterValidator:
    """Return a validator that accepts what settings with these bounds do; [`CompletionRequest`] describes them."""

    def check(value: Any) -> Any:
        check_value("", value, bounds)
        return value

    return AfterValidator(check)


def _sentence(message: str) -> PydanticCustomError:
    return PydanticCustomError("sentence", "{message}", {"message": message})


Text = Annotated[str, AfterValidator(_whole_characters)]
Texts = Annotated[list[Text], Field(fail_fast=True), BeforeValidator(_as_list)]
Unsupported = Annotated[Any, AfterValidator(_only_neutral)]
StopText = Annotated[Text, Field(min_length=1)]
StopTexts = Annotated[list[StopText], Field(fail_fast=True), BeforeValidator(_as_list), Field(max_length=4)]


class StreamOptions(BaseModel):
    """Options of a stream: `include_usage` adds token counts at the end."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """
    The body of a request. Each description completes the error "... is ..., but it must be ...".

    A field that is not declared is refused. The last eight accept only OpenAI's defaults, which some clients send.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Texts = Field(min_length=1, description="a string, or a list of 1 to {max_prompts} strings")
    model: str | None = Field(None, description="a string")
    max_tokens: Annotated[int | None, _within(**OUTPUT_LENGTH)] = Field(
        None, description="a whole number from 1 to {max_tokens}"
    )
    temperature: Annotated[float | None, _within(**OPENAI_TEMPERATURE, also=0)] = Field(
        None, description=f"0, or a number from {TEMPERATURE['minimum']} to 2"
    )
    top_p: Annotated[float | None, _within(**TOP_P)] = Field(
        None, description=f"a number above {TOP_P['above']} and at most {TOP_P['maximum']}"
    )
    seed: Annotated[int | None, _within()] = Field(None, description="a whole number of at most 64 bits")
    stop: StopTexts | None = Field(None, description="a string, or a list of up to 4 strings, none of them empty")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object with include_usage, true or false")
    user: Any = None

    n: Unsupported = None
    best_of: Unsupported = None
    echo: Unsupported = None
    logprobs: Unsupported = None
    suffix: Unsupported = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None

    @field_validator("prompt")
    @classmethod
    def _check_number(cls, prompts: list[str], info: ValidationInfo[Limits]) -> list[str]:
        if len(prompts) > info.context.max_prompts:
            raise ValueError
        return prompts

    @field_validator("max_tokens")
    @classmethod
    def _check_length(cls, max_tokens: int | None, info: ValidationInfo[Limits]) -> int | None:
        if max_tokens is not None and max_tokens > info.context.max_tokens:
            raise ValueError
        return max_tokens

    @model_validator(mode="after")
    def _check_combinations(self, info: ValidationInfo[Limits]) -> CompletionRequest:
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise _sentence("stream_options needs a stream. Add stream: true, or leave stream_options out.")
        if self.temperature and info.context.num_beams > 1:
            raise _sentence("This server uses beam search and does not sample. Leave temperature out.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def decoding(self, default_max_tokens: int) -> Decoding:
        """Return how the outputs are generated."""
        return Decoding(
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature or 0,
            top_p=1 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )


def parse_request(body: bytes, limits: Limits) -> CompletionRequest:
    """Return the request in a body, or raise [`RequestError`] with the first thing that is wrong."""
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise RequestError(400, f"The request is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "The request must be a JSON object.")
    try:
        request = CompletionRequest.model_validate(fields, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(400, _message(first, limits), param) from None
    if request.model not in (None, limits.model):
        message = f"This server has no model {shown(request.model)}. Its model is {limits.model!r}."
        raise RequestError(404, message, "model")
    return request


def _message(error: ErrorDetails, limits: Limits) -> str:
    """Return an error of pydantic as one sentence."""
    kind, path, given = error["type"], ".".join(str(part)[:40] for part in error["loc"]), shown(error["input"])
    if kind == "sentence":
        return error["msg"]
    if kind == "string_unicode":
        return HALF_A_CHARACTER
    name = str(error["loc"][0])
    field = CompletionRequest.model_fields.get(name)
    if field is None or field.description is None:
        return f"{path} is {given}, which is not supported. Leave it out."
    rule = field.description.format(**asdict(limits))
    if kind == "missing":
        return f"{path} is missing. It must be {rule}."
    return f"{path} is {given}, but {'it' if path == name else name} must be {rule}."


class Choice(BaseModel):
    """An output, or a piece of it: `index` is the number of its prompt."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Usage(BaseModel):
    """Token counts of a request, summed over its prompts. End tokens are included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A response, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None

    def json_text(self) -> str:
        """Return the response as JSON, without `usage` where it is not known yet."""
        return self.model_dump_json(exclude={"usage"} if self.usage is None else None)


def choice(index: int, piece: Piece) -> Choice:
    """Return a piece of the output for prompt `index`."""
    return Choice(index=index, text=piece.text, finish_reason=piece.finish_reason)


def error_content(error: HTTPException) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    param = getattr(error, "param", None)
    return {"error": {"message": error.detail, "type": kind, "param": param, "code": None}}
