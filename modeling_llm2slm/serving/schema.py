"""Requests of `POST /v1/completions` and `POST /v1/chat/completions`, as OpenAI's clients send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.exceptions import HTTPException

from ..data.conversations import as_prompt
from ..data.order import seeded
from ..data.parsing import parse_json
from ..settings import OUTPUT_LENGTH, TEMPERATURE, TOP_P, check_value, shown
from .jobs import Decoding


ANYTHING = None  # in a table of fields: any value is accepted
# Fields that clients send and that this server does not have, with the values that change nothing. `null` is one of
# them. Any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    # OpenAI's
    "best_of": (1,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "store": (False,), "service_tier": ("auto", "default"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "verbosity": ("medium",), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "audio": (), "prediction": (), "web_search_options": (),
    "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "parallel_tool_calls": ANYTHING, "user": ANYTHING,
    "metadata": ANYTHING, "safety_identifier": ANYTHING, "prompt_cache_key": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    # vLLM's
    "top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,), "length_penalty": (1,), "min_tokens": (0,),
    "use_beam_search": (False,), "ignore_eos": (False,), "skip_special_tokens": (True,), "stop_token_ids": ([],),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "bad_words": ([],),
    "add_special_tokens": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "documents": ([],), "chat_template_kwargs": ({},), "priority": (0,), "return_token_ids": (False,),
}  # fmt: skip
NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...] | None] = {
    "type": ("text",), "refusal": (), "audio": (), "annotations": ([],), "tool_calls": ([],), "function_call": (),
}  # fmt: skip
NEUTRAL_IN_STREAM_OPTIONS = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
OPENAI_TEMPERATURE = {**TEMPERATURE, "maximum": 2}
MAX_STOP_TEXTS, MAX_LOGPROBS = 16, 20
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
        max_prompts: The number of prompts in a request, and of outputs.
        num_beams: The server's number of beams. Above 1, it does not sample.
    """

    model: str
    max_tokens: int
    max_prompts: int
    num_beams: int = 1

    def no_model(self, name: Any) -> RequestError:
        """Return the error for another model than the one that is served."""
        return RequestError(404, f"This server has no model {shown(name)}. Its model is {self.model!r}.", "model")


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _sentence(HALF_A_CHARACTER) from None
    return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """Return one prompt as a list with one prompt."""
    is_ids = isinstance(value, list) and bool(value) and isinstance(value[0], int)
    return [value] if isinstance(value, str) or is_ids else value


def _kind_of_prompts(value: Any) -> str:
    return "ids" if isinstance(value, list) and value and isinstance(value[0], list) else "texts"


def _as_text(value: Any) -> Any:
    """Return the text of a message that comes in parts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        texts = [part.get("text") for part in value if part.keys() == {"type", "text"} and part["type"] == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
    return value


def _within(**bounds: Any) -> AfterValidator:
    """Return a validator that accepts what settings with these bounds do; descriptions of fields describe them."""

    def check(value: Any) -> Any:
        check_value("", value, bounds)
        return value

    return AfterValidator(check)


def _sentence(message: str, param: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("sentence", "{message}", {"message": message, "param": param})


Text = Annotated[str, AfterValidator(_whole_characters)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Prompts = Annotated[
    Annotated[Texts, Tag("texts")] | Annotated[list[TokenIds], Field(fail_fast=True), Tag("ids")],
    Discriminator(_kind_of_prompts),
    BeforeValidator(_as_prompts),
]
StopText = Annotated[Text, Field(min_length=1)]
StopTexts = Annotated[
    list[StopText], Field(fail_fast=True), BeforeValidator(_as_list), Field(max_length=MAX_STOP_TEXTS)
]
Length = Annotated[int | None, _within(**OUTPUT_LENGTH)]


class _Fields(BaseModel):
    """Fields of a JSON object. One that is not declared is refused, unless its value is `neutral`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    neutral: ClassVar[Mapping[str, tuple[Any, ...] | None]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if name in cls.model_fields or not is_neutral(name, value, cls.neutral)
        }


def is_neutral(name: str, value: Any, table: Mapping[str, tuple[Any, ...] | None] = NEUTRAL) -> bool:
    """Return whether an undeclared field has a value that changes nothing."""
    if name not in table:
        return False
    accepted = table[name]
    if value is None or accepted is ANYTHING:
        return True
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted)


class StreamOptions(_Fields):
    """Options of a stream: `include_usage` adds token counts at the end."""

    neutral = NEUTRAL_IN_STREAM_OPTIONS

    include_usage: bool = False


class Message(_Fields):
    """A message of a conversation."""

    neutral = NEUTRAL_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_as_text)]
    name: Text | None = None


class GenerationRequest(_Fields):
    """The fields that all requests have. Each description completes the error "... is ..., but it must be ..."."""

    neutral = NEUTRAL

    model: str | None = Field(None, description="a string")
    max_tokens: Length = Field(None, description="a whole number from 1 to {max_tokens}")
    temperature: Annotated[float | None, _within(**OPENAI_TEMPERATURE, also=0)] = Field(
        None, description=f"0, or a number from {TEMPERATURE['minimum']} to 2"
    )
    top_p: Annotated[float | None, _within(**TOP_P)] = Field(
        None, description=f"a number above {TOP_P['above']} and at most {TOP_P['maximum']}"
    )
    seed: Annotated[int | None, _within()] = Field(None, description="a whole number of at most 64 bits")
    n: int | None = Field(None, ge=1, description="a whole number from 1 to {max_prompts}")
    stop: StopTexts | None = Field(
        None, description=f"a string, or a list of up to {MAX_STOP_TEXTS} strings, none of them empty"
    )
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object with include_usage, true or false")

    @field_validator("max_tokens", "max_completion_tokens", check_fields=False)
    @classmethod
    def _check_length(cls, max_tokens: int | None, info: ValidationInfo[Limits]) -> int | None:
        if max_tokens is not None and max_tokens > info.context.max_tokens:
            raise ValueError
        return max_tokens

    @field_validator("n")
    @classmethod
    def _check_n(cls, n: int | None, info: ValidationInfo[Limits]) -> int | None:
        if n is not None and n > info.context.max_prompts:
            raise ValueError
        return n

    @model_validator(mode="after")
    def _check_combinations(self, info: ValidationInfo[Limits]) -> GenerationRequest:
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            message = "stream_options needs a stream. Add stream: true, or leave stream_options out."
            raise _sentence(message, "stream_options")
        if info.context.num_beams > 1:
            asked = {"temperature": self.temperature, "logprobs": self.top is not None, "n": self.samples > 1}
            for name, value in asked.items():
                if value:
                    raise _sentence(f"This server uses beam search and does not sample. Leave {name} out.", name)
        if self.outputs > info.context.max_prompts:
            message = (
                f"The request asks for {self.outputs} outputs, but at most {info.context.max_prompts} are allowed."
            )
            raise _sentence(message, "n")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def samples(self) -> int:
        """The number of outputs of each prompt."""
        return self.n or 1

    @property
    def outputs(self) -> int:
        """The number of outputs of all prompts."""
        return len(self.prompts) * self.samples

    @property
    def prompts(self) -> list[Any]:
        """The prompts: texts, conversations as [`as_prompt`] writes them, or token ids."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """Longest output, in tokens; `None` for the server's default."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """For how many likeliest tokens log-probabilities are returned; `None` returns none at all."""
        raise NotImplementedError

    def decoding(self, default_max_tokens: int, sample: int = 0) -> Decoding:
        """Return how output number `sample` of a prompt is generated. The first has the seed of the request."""
        seed = self.seed
        if seed is not None and sample:
            seed = seeded(seed % 2**62, sample).initial_seed()
        return Decoding(
            max_tokens=default_max_tokens if self.longest is None else self.longest,
            temperature=self.temperature or 0,
            top_p=1 if self.top_p is None else self.top_p,
            seed=seed,
            stop=tuple(self.stop or ()),
            logprobs=self.top,
        )


class CompletionRequest(GenerationRequest):
    """The body of a request to `/v1/completions`."""

    prompt: Prompts = Field(
        description="a string, or a list of 1 to {max_prompts} strings, or token ids of the LLM: a list, or a list of "
        "such lists",
    )
    echo: bool | None = Field(None, description="true or false")
    logprobs: Annotated[int | None, _within(minimum=0, maximum=MAX_LOGPROBS)] = Field(
        None, description=f"a whole number from 0 to {MAX_LOGPROBS}"
    )

    @field_validator("prompt")
    @classmethod
    def _check_number(cls, prompts: list[Any], info: ValidationInfo[Limits]) -> list[Any]:
        if not 1 <= len(prompts) <= info.context.max_prompts:
            raise ValueError
        return prompts

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise _sentence(
                "echo and logprobs cannot be combined: the model gives no probabilities to the tokens of its prompt. "
                "Leave one of them out.",
                "echo",
            )
        return self

    @property
    def prompts(self) -> list[Any]:
        return self.prompt

    @property
    def top(self) -> int | None:
        return self.logprobs


class ChatRequest(GenerationRequest):
    """The body of a request to `/v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        description="a list of messages, each with a text as content and a role: system, developer, user or assistant",
    )
    max_completion_tokens: Length = Field(None, description="a whole number from 1 to {max_tokens}")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: Annotated[int | None, _within(minimum=0, maximum=MAX_LOGPROBS)] = Field(
        None, description=f"a whole number from 0 to {MAX_LOGPROBS}"
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs needs logprobs. Add logprobs: true, or leave top_logprobs out."
            raise _sentence(message, "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens differ. Leave max_tokens out."
            raise _sentence(message, "max_tokens")
        return self

    @property
    def prompts(self) -> list[Any]:
        return [as_prompt([message.model_dump(exclude_none=True) for message in self.messages])]

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_request(body: bytes, limits: Limits, kind: type[RequestT]) -> RequestT:
    """Return the request in a body, or raise [`RequestError`] with the first thing that is wrong."""
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise RequestError(400, f"The request is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "The request must be a JSON object.")
    try:
        request = kind.model_validate(fields, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else first.get("ctx", {}).get("param")
        raise RequestError(400, _message(first, limits, kind), param) from None
    if request.model not in (None, limits.model):
        raise limits.no_model(request.model)
    return request


def _message(error: ErrorDetails, limits: Limits, request: type[GenerationRequest]) -> str:
    """Return an error of pydantic as one sentence."""
    kind, given = error["type"], shown(error["input"])
    if kind == "sentence":
        return error["msg"]
    if kind == "string_unicode":
        return HALF_A_CHARACTER
    name, *inner = (str(part)[:40] for part in error["loc"])
    path = ".".join([name, *(inner[1:] if name == "prompt" else inner)])  # its first part is the kind of the prompts
    field = request.model_fields.get(name)
    if kind == "extra_forbidden" or field is None or field.description is None:
        return f"{path} is {given}, which is not supported. Leave it out."
    rule = field.description.format(**asdict(limits))
    if kind == "missing":
        return f"{path} is missing. {'It' if path == name else name} must be {rule}."
    return f"{path} is {given}, but {'it' if path == name else name} must be {rule}."
