"""Answers over HTTP, in the way of OpenAI's `/v1/completions`, with requests that arrive together in one batch."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..inference.text_to_text import TextToText
from .scheduler import Batcher, Decoding, Job, Piece, QueueFull


try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[serve]'") from error


# Fields of a request that ask for something else than what is done here, with the values that do not.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "logprobs": (None,),
    "suffix": (None, ""),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
}
FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream", "stream_options", "stop", "user"}
MAX_STOPS = 4


@dataclass(frozen=True)
class ServeSettings:
    """
    What a server does and what it refuses.

    Args:
        name: What the model is called in requests and answers.
        max_batch: At most this many prompts are answered at once.
        max_wait: Seconds that a batch waits for more prompts.
        max_queue: At most this many prompts wait; more are refused with 503.
        max_prompt_tokens: The longest prompt, in tokens of the LLM (default: the checkpoint's own limit, or 2,048).
        max_new_tokens: The longest answer that may be asked for, in tokens (default: 1,024, or the checkpoint's own
            limit if that is more).
        max_body: The longest request, in bytes.
        num_beams: Of all answers; above 1 nothing is sampled, and what is to stream comes in one piece.
        timeout: Seconds after which a request is given up.
        shutdown_timeout: Seconds that running requests have left when the server is told to stop.
    """

    name: str
    max_batch: int = 16
    max_wait: float = 0.005
    max_queue: int = 64
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_body: int = 1_000_000
    num_beams: int = 1
    timeout: float = 120
    shutdown_timeout: float = 30


@dataclass(frozen=True)
class Completion:
    """
    A request that is in order.

    Args:
        prompts: The texts to answer.
        decoding: How to answer them.
        stream: Whether pieces are sent as they come.
        include_usage: Whether a stream ends with the numbers of tokens.
    """

    prompts: list[str]
    decoding: Decoding
    stream: bool
    include_usage: bool


class Service:
    """
    The routes of the server, and what they share.

    Args:
        text_to_text: The model. Its prompts are no longer cut, as those that are too long are refused.
        settings: See [`ServeSettings`].
    """

    def __init__(self, text_to_text: TextToText, settings: ServeSettings):
        self.text_to_text = text_to_text
        self.settings = settings
        own_limit = _stop_cutting(text_to_text)
        self.max_prompt_tokens = settings.max_prompt_tokens or own_limit or 2048
        self.default_tokens: int = text_to_text.with_limit({})["max_new_tokens"]
        self.max_new_tokens = settings.max_new_tokens or max(1024, self.default_tokens)
        self.default_tokens = min(self.default_tokens, self.max_new_tokens)
        self.batcher = Batcher(
            text_to_text, settings.max_batch, settings.max_wait, settings.max_queue, settings.num_beams
        )
        # One thread, as a tokenizer may not be used by two at once.
        self._tokenizing = ThreadPoolExecutor(1)
        self.open: set[_Answer] = set()

    def give_up(self) -> None:
        """Ends every request that is not finished."""
        for answer in self.open:
            answer.end(HTTPException(503, "The server was stopped before the answer was finished."))

    def app(self) -> Starlette:
        """The ASGI application, whose lifespan is the batcher's."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        handlers: Any = {HTTPException: _as_json, ClientDisconnect: _gone}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, self.batcher.stop)
            self._tokenizing.shutdown()

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        model = {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "modeling-llm2slm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """`GET /health`: how many prompts wait, and how many are being answered."""
        return JSONResponse({"status": "ok", "queue": len(self.batcher), "running": self.batcher.running})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters in the way of Prometheus."""
        counters = {name: getattr(self.batcher, name) for name in ("prompts", "failed", "tokens", "batches")}
        lines = [
            f"# TYPE llm2slm_{name}_total counter\nllm2slm_{name}_total {count}" for name, count in counters.items()
        ]
        gauges = {"queue": len(self.batcher), "running": self.batcher.running}
        lines += [f"# TYPE llm2slm_{name} gauge\nllm2slm_{name} {count}" for name, count in gauges.items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        deadline = time.monotonic() + self.settings.timeout
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"The request did not arrive within {self.settings.timeout:g} s.") from None
        asked = self.parse(body)
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._tokenizing, self.tokenize, asked)
        answer = _Answer(self, request, asked, ids, deadline)
        try:
            answer.begin()
        except QueueFull:
            raise HTTPException(
                503, f"{len(self.batcher)} prompts are waiting. Try again later.", {"Retry-After": "1"}
            ) from None
        if asked.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(answer.events(), media_type="text/event-stream", headers=headers)
        return await answer.whole()

    async def _body(self, request: Request) -> bytes:
        limit, body = self.settings.max_body, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"The request has more than {limit:,} bytes.")
        return bytes(body)

    def parse(self, body: bytes) -> Completion:
        """Reads a request; `HTTPException` 400 or 404 with what is wrong."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The request is not JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise HTTPException(400, "The request is no JSON object.")
        for name, value in fields.items():
            if name not in FIELDS and (name not in NOT_SUPPORTED or value not in NOT_SUPPORTED[name]):
                raise HTTPException(400, f"{name} is {_shown(value)}, which is not supported. Leave it out.")
        if fields.get("model") not in (None, self.settings.name):
            raise HTTPException(404, f"There is no model {fields['model']!r} here, only {self.settings.name!r}.")
        stream = _field(fields, "stream", bool, False)
        options = _field(fields, "stream_options", dict, {})
        usage = options.get("include_usage", False)
        if not isinstance(usage, bool) or set(options) - {"include_usage"} or (options and not stream):
            raise HTTPException(400, "stream_options takes include_usage, true or false, of a stream.")
        temperature = _number(fields, "temperature", 0, 0, 2)
        if temperature and self.settings.num_beams > 1:
            raise HTTPException(400, "This server searches with beams and draws nothing. Leave temperature out.")
        top_p = _number(fields, "top_p", 1, 0, 1)
        if not top_p:
            raise HTTPException(400, "top_p is 0, but it must be above 0 and at most 1.")
        decoding = Decoding(
            max_tokens=int(_number(fields, "max_tokens", self.default_tokens, 1, self.max_new_tokens, int)),
            temperature=temperature,
            top_p=top_p,
            seed=_field(fields, "seed", int, None),
            stop=_stops(fields.get("stop")),
        )
        if decoding.seed is not None and not -(2**63) <= decoding.seed < 2**63:
            raise HTTPException(400, "seed has more than 64 bits.")
        return Completion(self._prompts(fields.get("prompt")), decoding, stream, usage)

    def _prompts(self, prompt: Any) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise HTTPException(400, "prompt is neither a text nor a list of texts.")
        if len(prompts) > self.settings.max_queue:
            raise HTTPException(
                400, f"There are {len(prompts)} prompts in the request, but at most {self.settings.max_queue} may be."
            )
        try:
            "".join(prompts).encode()
        except UnicodeEncodeError:
            raise HTTPException(400, "prompt has half a surrogate pair, which is no character.") from None
        return prompts

    def tokenize(self, asked: Completion) -> list[list[int]]:
        """The token ids of each prompt; `HTTPException` 400 for one that is too long or empty."""
        rows = self.text_to_text.features(asked.prompts)["input_ids"]
        for ids in rows:
            if not ids:
                raise HTTPException(400, "prompt is empty.")
            if len(ids) > self.max_prompt_tokens:
                raise HTTPException(
                    400, f"prompt has {len(ids)} tokens, but at most {self.max_prompt_tokens} are taken."
                )
            try:
                self.text_to_text.check_positions(len(ids), asked.decoding.max_tokens)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        return rows


class _Answer:
    """What a request gets: its jobs, and their pieces as they come."""

    def __init__(
        self, service: Service, request: Request, asked: Completion, ids: Sequence[Sequence[int]], deadline: float
    ):
        self.service = service
        self.request = request
        self.asked = asked
        self.deadline = deadline
        self.prompt_tokens = sum(map(len, ids))
        self.tokens = [0] * len(ids)
        self.said = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self.jobs = [Job(row, asked.decoding, self._send_as(index), asked.stream) for index, row in enumerate(ids)]

    def begin(self) -> None:
        """Queues the jobs, or raises [`QueueFull`]; and watches whether the client is there."""
        self.service.batcher.submit(self.jobs)
        self.service.open.add(self)
        self._watching = asyncio.ensure_future(self._watch())

    def end(self, reason: Exception) -> None:
        """Has the request end with an exception in place of what is still to come."""
        self._arrived.put_nowait((0, reason))

    def _send_as(self, index: int) -> Callable[[Piece | Exception], None]:
        def send(piece: Piece | Exception) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))

        return send

    async def whole(self) -> Response:
        """All answers in one response."""
        choices: list[dict[str, Any]] = [{}] * len(self.jobs)
        async for index, piece in self._pieces():
            choices[index] = _choice(index, piece)
        return JSONResponse(self._chunk(choices, usage=self._usage()))

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, one for each piece."""
        try:
            async for index, piece in self._pieces():
                yield _event(self._chunk([_choice(index, piece)]))
        except HTTPException as error:  # the status has been sent
            yield _event(_error(error.status_code, error.detail))
        except ClientDisconnect:
            return
        else:
            if self.asked.include_usage:
                yield _event(self._chunk([], usage=self._usage()))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.jobs)
        try:
            while left:
                try:
                    async with asyncio.timeout(self.deadline - time.monotonic()):
                        index, piece = await self._arrived.get()
                except TimeoutError:
                    raise HTTPException(504, "The answer was not finished in time.") from None
                if isinstance(piece, (ClientDisconnect, HTTPException)):
                    raise piece
                if isinstance(piece, Exception):
                    raise HTTPException(500, f"The model failed: {' '.join(str(piece).split())}")
                self.tokens[index] = piece.tokens
                left -= piece.finish_reason is not None
                yield index, piece
        finally:
            self._watching.cancel()
            self.service.open.discard(self)
            for job in self.jobs:
                job.cancel()

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.end(ClientDisconnect())

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.said, "model": self.service.settings.name, "choices": choices, **more}

    def _usage(self) -> dict[str, int]:
        completion = sum(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server, which does not listen yet; `OSError` with the fix where the address cannot be had."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        message = f"{host}:{port} cannot be served on: {error.strerror}. Choose another --port or --host."
        raise OSError(message) from error
    return sock


def make_server(service: Service, ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """A server for a service; `ready` is called when it takes requests."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(service.settings.shutdown_timeout, service.give_up)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        service.app(), lifespan="on", ws="none", log_level="warning", access_log=False,
        timeout_graceful_shutdown=round(service.settings.shutdown_timeout) + 5,  # for requests half sent
    )  # fmt: skip
    return Server(config)


def serve(
    text_to_text: TextToText, settings: ServeSettings, sock: socket.socket, ready: Callable[[], None] = lambda: None
) -> None:
    """
    Serves until the process gets SIGTERM or SIGINT. Then no more requests are taken, and those that run are finished.

    Args:
        text_to_text: The model.
        settings: See [`ServeSettings`].
        sock: From [`bind`].
        ready: Called when requests are taken.
    """

    server = make_server(Service(text_to_text, settings), ready)

    def stop(*_: Any) -> None:
        server.should_exit = True

    # At its end uvicorn raises the signal once more, for handlers that were there before: a server that was told to
    # stop and did has not failed.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_cutting(text_to_text: TextToText) -> int | None:
    """Switches off the cutting of prompts, and returns to how many tokens they were cut."""
    limit = text_to_text.prompt_max_length
    text_to_text.prompt_max_length = None
    if hasattr(text_to_text.processor, "prompt_max_length"):
        text_to_text.processor.prompt_max_length = None
    return limit


def _field(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise HTTPException(400, f"{name} is {_shown(value)}, but it must be {_SAID[kind]}.")
    return value


_SAID = {bool: "true or false", dict: "an object", int: "a whole number"}


def _number(
    fields: dict[str, Any], name: str, default: float, lowest: float, highest: float, kind: Any = (int, float)
) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value <= highest:
        whole = "a whole number" if kind is int else "a number"
        raise HTTPException(400, f"{name} is {_shown(value)}, but it must be {whole} from {lowest} to {highest}.")
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise HTTPException(400, f"stop is neither a text nor a list of up to {MAX_STOPS} texts.")
    return tuple(stops)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _choice(index: int, piece: Piece) -> dict[str, Any]:
    return {"index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="backslashreplace").decode()  # a name in it may be half a surrogate pair
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _as_json(request: Request, error: HTTPException) -> Response:
    return JSONResponse(_error(error.status_code, error.detail), error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
