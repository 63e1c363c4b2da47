"""The routes of the HTTP server: OpenAI's `/v1/completions` and `/v1/models`, `/health` and Prometheus' `/metrics`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..inference.text_to_text import TextToText
from ..settings import ServeSettings
from .scheduler import Batcher, Job, Piece, QueueFull, batcher_for
from .schema import (
    CompletionRequest,
    CompletionResponse,
    Limits,
    RequestError,
    Usage,
    choice,
    error_content,
    parse_request,
)


DEFAULT_MAX_PROMPT_TOKENS, DEFAULT_MAX_NEW_TOKENS = 2048, 1024


class Service:
    """
    The routes of the server, and their shared state.

    Args:
        text_to_text: The model. It no longer truncates prompts: those that are too long are refused.
        settings: Settings and limits of the server.

    Attributes:
        batcher: Generates for the prompts of all requests.
        open: The requests that are not finished.
    """

    def __init__(self, text_to_text: TextToText, settings: ServeSettings):
        self.text_to_text = text_to_text
        self.settings = settings
        own_limit = _stop_truncation(text_to_text)
        self.max_prompt_tokens = settings.max_prompt_tokens or own_limit or DEFAULT_MAX_PROMPT_TOKENS
        default_tokens: int = text_to_text.with_limit({})["max_new_tokens"]
        max_tokens = settings.max_new_tokens or max(DEFAULT_MAX_NEW_TOKENS, default_tokens)
        self.default_tokens = min(default_tokens, max_tokens)
        self.limits = Limits(settings.name, max_tokens, settings.max_queue, settings.num_beams)
        self.batcher = batcher_for(text_to_text, settings)
        self.open: set[_Completions] = set()
        self._registry = CollectorRegistry()
        self._registry.register(_BatcherMetrics(self.batcher))
        # One thread, because two threads must not use a tokenizer at the same time.
        self._tokenizing = ThreadPoolExecutor(1)

    def abandon(self) -> None:
        """End every request that is not finished."""
        for completions in self.open:
            completions.end(HTTPException(503, "The server was stopped before the completion was finished."))

    def app(self) -> Starlette:
        """Return the ASGI application; its lifespan starts and stops the batcher."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        handlers: Any = {HTTPException: _error_response, ClientDisconnect: _disconnected}
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
        """`GET /v1/models`: the one model."""
        model = {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "modeling-llm2slm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """`GET /health`: how many prompts wait, and how many are in the batch that is being generated."""
        return JSONResponse({"status": "ok", "queue": len(self.batcher), "running": self.batcher.running})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters and gauges in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`: generate for one or more prompts, as a stream or in one response."""
        deadline = time.monotonic() + self.settings.timeout
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"The request did not arrive within {self.settings.timeout:g} s.") from None
        wanted = parse_request(body, self.limits)
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._tokenizing, self.tokenize, wanted)
        completions = _Completions(self, request, wanted, ids, deadline)
        try:
            completions.start()
        except QueueFull:
            message = f"{len(self.batcher)} prompts are waiting. Try again later."
            raise RequestError(503, message, headers={"Retry-After": "1"}) from None
        if wanted.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(completions.events(), media_type="text/event-stream", headers=headers)
        return await completions.response()

    async def _body(self, request: Request) -> bytes:
        limit, body = self.settings.max_body, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"The request has more than {limit:,} bytes.")
        return bytes(body)

    def tokenize(self, wanted: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt, or raise [`RequestError`] 400 for one that is too long or empty."""
        rows = self.text_to_text.features(wanted.prompt)["input_ids"]
        for ids in rows:
            if not ids:
                raise RequestError(400, "prompt is empty.", "prompt")
            if len(ids) > self.max_prompt_tokens:
                message = f"prompt has {len(ids)} tokens, but at most {self.max_prompt_tokens} are allowed."
                raise RequestError(400, message, "prompt")
            try:
                self.text_to_text.check_positions(len(ids), wanted.decoding(self.default_tokens).max_tokens)
            except ValueError as error:
                raise RequestError(400, str(error)) from None
        return rows


class _Completions:
    """The completions of one request: their jobs, and the pieces that arrive for them."""

    def __init__(
        self,
        service: Service,
        request: Request,
        wanted: CompletionRequest,
        ids: Sequence[Sequence[int]],
        deadline: float,
    ):
        self.service = service
        self.request = request
        self.wanted = wanted
        self.deadline = deadline
        self.prompt_tokens = sum(map(len, ids))
        self.tokens = [0] * len(ids)
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        decoding = wanted.decoding(service.default_tokens)
        self.jobs = [Job(row, decoding, self._sender(index), bool(wanted.stream)) for index, row in enumerate(ids)]

    def start(self) -> None:
        """Queue the jobs, or raise [`QueueFull`]; then watch for the client to disconnect."""
        self.service.batcher.submit(self.jobs)
        self.service.open.add(self)
        self._watching = asyncio.ensure_future(self._watch())

    def end(self, reason: Exception) -> None:
        """End the request with an exception in place of the pieces that have not arrived."""
        self._arrived.put_nowait((0, reason))

    async def response(self) -> Response:
        """Return all completions in one response."""
        pieces = {index: piece async for index, piece in self._pieces()}
        return _json_response(self._content([choice(*each) for each in sorted(pieces.items())], self._usage()))

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events, one for each piece."""
        try:
            async for index, piece in self._pieces():
                yield _event(self._content([choice(index, piece)]).json_text())
        except HTTPException as error:  # the status was sent with the first event
            yield _event(json.dumps(error_content(error), ensure_ascii=False))
        except ClientDisconnect:
            return
        else:
            if self.wanted.include_usage:
                yield _event(self._content([], self._usage()).json_text())
        yield _event("[DONE]")

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        unfinished = len(self.jobs)
        try:
            while unfinished:
                try:
                    async with asyncio.timeout(self.deadline - time.monotonic()):
                        index, piece = await self._arrived.get()
                except TimeoutError:
                    raise HTTPException(504, "The completion was not finished in time.") from None
                if isinstance(piece, (ClientDisconnect, HTTPException)):
                    raise piece
                if isinstance(piece, Exception):
                    raise HTTPException(500, f"The model failed: {' '.join(str(piece).split())}")
                self.tokens[index] = piece.tokens
                unfinished -= piece.finish_reason is not None
                yield index, piece
        finally:
            self._watching.cancel()
            self.service.open.discard(self)
            for job in self.jobs:
                job.cancel()

    def _sender(self, index: int) -> Callable[[Piece | Exception], None]:
        """Return the function that the batcher's thread calls with each piece of prompt `index`."""

        def send(piece: Piece | Exception) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))

        return send

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.end(ClientDisconnect())

    def _content(self, choices: list[Any], usage: Usage | None = None) -> CompletionResponse:
        name = self.service.settings.name
        return CompletionResponse(id=self.id, created=self.created, model=name, choices=choices, usage=usage)

    def _usage(self) -> Usage:
        prompt, completion = self.prompt_tokens, sum(self.tokens)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class _BatcherMetrics(Collector):
    """Reads the batcher's counts whenever Prometheus asks for them."""

    def __init__(self, batcher: Batcher):
        self.batcher = batcher

    def collect(self) -> Iterator[Metric]:
        counters = {
            "prompts": "Outputs finished.",
            "failed": "Prompts that the model failed on.",
            "tokens": "Tokens generated.",
            "batches": "Batches generated.",
        }
        for name, description in counters.items():
            yield CounterMetricFamily(f"llm2slm_{name}", description, getattr(self.batcher, name))
        yield GaugeMetricFamily("llm2slm_queue", "Prompts that wait.", len(self.batcher))
        yield GaugeMetricFamily("llm2slm_running", "Prompts in the batch being generated.", self.batcher.running)


def _stop_truncation(text_to_text: TextToText) -> int | None:
    """Stop truncating prompts, and return the number of tokens that they were truncated to."""
    limit = text_to_text.prompt_max_length
    text_to_text.prompt_max_length = None
    if hasattr(text_to_text.processor, "prompt_max_length"):
        text_to_text.processor.prompt_max_length = None
    return limit


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _json_response(content: CompletionResponse) -> Response:
    return Response(content.json_text(), media_type="application/json")


async def _error_response(request: Request, error: HTTPException) -> Response:
    return JSONResponse(error_content(error), error.status_code, error.headers)


async def _disconnected(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
