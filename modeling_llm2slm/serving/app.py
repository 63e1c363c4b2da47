"""The routes of the HTTP server: OpenAI's API, its description, `/health` and Prometheus' `/metrics`."""

from __future__ import annotations

import asyncio
import functools
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
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..inference.text_to_text import TextToText
from ..settings import ServeSettings, shown
from .jobs import Job, Piece
from .openapi import api_description, docs_page
from .responses import ChatForm, CompletionForm, Form, Model, ModelList, Usage, error_content
from .scheduler import Batcher, QueueFull, batcher_for
from .schema import ChatRequest, CompletionRequest, GenerationRequest, Limits, RequestError, parse_request


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
        self.open: set[_Outputs] = set()
        self._registry = CollectorRegistry()
        self._registry.register(_BatcherMetrics(self.batcher))
        # One thread, because two threads must not use a tokenizer at the same time.
        self._tokenizing = ThreadPoolExecutor(1)

    def abandon(self) -> None:
        """End every request that is not finished."""
        for outputs in self.open:
            outputs.end(HTTPException(503, "The server was stopped before the completion was finished."))

    def app(self) -> Starlette:
        """Return the ASGI application; its lifespan starts and stops the batcher."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.docs),
        ]
        handlers: Any = {HTTPException: _error_response, ClientDisconnect: _disconnected}
        cors: dict[str, Any] = {
            "allow_origins": self.settings.allow_origin, "allow_methods": ["GET", "POST"], "allow_headers": ["*"],
            "expose_headers": ["Retry-After"],
        }  # fmt: skip
        middleware = [Middleware(CORSMiddleware, **cors)] if self.settings.allow_origin else []
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers, middleware=middleware)

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
        return JSONResponse(ModelList(data=[Model(id=self.settings.name)]).model_dump())

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`: the one model, or 404."""
        name = request.path_params["name"]
        if name != self.settings.name:
            raise self.limits.no_model(name)
        return JSONResponse(Model(id=name).model_dump())

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`: the description of the API."""
        return JSONResponse(api_description(self.limits))

    async def docs(self, request: Request) -> Response:
        """`GET /docs`: the description of the API as a page."""
        return HTMLResponse(docs_page(api_description(self.limits)))

    async def health(self, request: Request) -> Response:
        """`GET /health`: how many prompts wait, and how many are in the batch that is being generated."""
        return JSONResponse({"status": "ok", "queue": len(self.batcher), "running": self.batcher.running})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters and gauges in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`: generate for one or more prompts, as a stream or in one response."""
        return await self._generate(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`: generate the next message of a conversation."""
        return await self._generate(request, ChatRequest)

    async def _generate(self, request: Request, kind: type[GenerationRequest]) -> Response:
        deadline = time.monotonic() + self.settings.timeout
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"The request did not arrive within {self.settings.timeout:g} s.") from None
        wanted = parse_request(body, self.limits, kind)
        limit = wanted.decoding(self.default_tokens).max_tokens
        try:
            with self.batcher.place([limit] * wanted.outputs):
                loop = asyncio.get_running_loop()
                ids, form = await loop.run_in_executor(self._tokenizing, self.prepare, wanted)
                outputs = _Outputs(self, request, wanted, ids, form, deadline)
                outputs.start()
        except QueueFull as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise RequestError(503, f"{error} Try again later.", headers=headers) from None
        if wanted.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(outputs.events(), media_type="text/event-stream", headers=headers)
        return await outputs.response()

    async def _body(self, request: Request) -> bytes:
        limit, body = self.settings.max_body, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"The request has more than {limit:,} bytes.")
        return bytes(body)

    def prepare(self, wanted: GenerationRequest) -> tuple[list[list[int]], Form]:
        """Return the token ids of each prompt and the form of the outputs; [`RequestError`] 400 for a wrong prompt."""
        is_chat = isinstance(wanted, ChatRequest)
        name = "messages" if is_chat else "prompt"
        prompts: list[Any] = wanted.prompts
        if isinstance(prompts[0], str):
            if is_chat and not self._has_chat_template:
                message = "This model has no chat template. Use /v1/completions, or put a chat_template.jinja"
                raise RequestError(400, f"{message} into its folder.", name)
            try:
                prompts = self.text_to_text.features(prompts)["input_ids"]
            except ValueError as error:  # the template refuses it
                raise RequestError(400, " ".join(str(error).split()), name) from None
        for ids in prompts:
            self._check_prompt(ids, wanted, name)
        return prompts, ChatForm() if is_chat else self._completion_form(wanted)

    def _check_prompt(self, ids: Sequence[int], wanted: GenerationRequest, name: str) -> None:
        if not ids:
            raise RequestError(400, f"{name} is empty.", name)
        if len(ids) > self.max_prompt_tokens:
            message = f"{name} has {len(ids)} tokens, but at most {self.max_prompt_tokens} are allowed."
            raise RequestError(400, message, name)
        if max(ids) >= len(self._reader):
            message = f"{name} holds the token id {shown(max(ids))}, but ids end at {len(self._reader) - 1}."
            raise RequestError(400, message, name)
        try:
            self.text_to_text.check_positions(len(ids), wanted.decoding(self.default_tokens).max_tokens)
        except ValueError as error:
            raise RequestError(400, str(error)) from None

    def _completion_form(self, wanted: Any) -> CompletionForm:
        prompts = wanted.prompts if wanted.echo else [""] * len(wanted.prompts)
        texts = [each if isinstance(each, str) else self._reader.decode(each) for each in prompts]
        return CompletionForm([text for text in texts for _ in range(wanted.samples)])

    @property
    def _reader(self) -> Any:
        """The tokenizer of prompts."""
        return getattr(self.text_to_text.processor, "tokenizer", self.text_to_text.processor)

    @property
    def _has_chat_template(self) -> bool:
        holders = (self.text_to_text.processor, self._reader)
        return any(getattr(holder, "chat_template", None) for holder in holders)


class _Outputs:
    """The outputs of one request: their jobs, and the pieces that arrive for them."""

    def __init__(
        self,
        service: Service,
        request: Request,
        wanted: GenerationRequest,
        ids: Sequence[Sequence[int]],
        form: Form,
        deadline: float,
    ):
        self.service = service
        self.request = request
        self.wanted = wanted
        self.deadline = deadline
        self.form: Any = form
        self.prompt_tokens = sum(map(len, ids))
        self.tokens = [0] * wanted.outputs
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        decodings = [wanted.decoding(service.default_tokens, sample) for sample in range(wanted.samples)]
        pairs = [(row, decoding) for row in ids for decoding in decodings]
        self.jobs = [
            Job(row, decoding, self._sender(index), bool(wanted.stream)) for index, (row, decoding) in enumerate(pairs)
        ]

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """The fields that all events of a stream share."""
        name = self.service.settings.name
        return {"id": f"{self.form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def start(self) -> None:
        """Queue the jobs; then watch for the client to disconnect."""
        self.service.batcher.submit(self.jobs)
        self.service.open.add(self)
        self._watching = asyncio.ensure_future(self._watch())

    def end(self, reason: Exception) -> None:
        """End the request with an exception in place of the pieces that have not arrived."""
        self._arrived.put_nowait((0, reason))

    def close(self) -> None:
        """Stop what is not finished: nobody waits for it any more."""
        self.service.open.discard(self)
        for job in self.jobs:
            job.cancel()

    async def response(self) -> Response:
        """Return all outputs in one response."""
        pieces = {index: piece async for index, piece in self._pieces()}
        choices: Any = [self.form.choice(*each) for each in sorted(pieces.items())]
        content = self.form.whole(choices=choices, usage=self._usage(), **self.common)
        return Response(content.json_text(), media_type="application/json")

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events, one for each piece."""
        try:
            for index in range(len(self.jobs)):
                for choice in self.form.opening(index):
                    yield self._event([choice])
            async for index, piece in self._pieces():
                for choice in self.form.pieces(index, piece):
                    yield self._event([choice])
        except HTTPException as error:  # the status was sent with the first event
            yield _event(json.dumps(error_content(error), ensure_ascii=False))
        except ClientDisconnect:
            return
        else:
            if self.wanted.include_usage:
                yield self._event([], self._usage())
        yield _event("[DONE]")

    def _event(self, choices: list[Any], usage: Usage | None = None) -> str:
        return _event(self.form.event(choices=choices, usage=usage, **self.common).json_text())

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
            self.close()

    def _sender(self, index: int) -> Callable[[Piece | Exception], None]:
        """Return the function that the batcher's thread calls with each piece of prompt `index`."""

        def send(piece: Piece | Exception) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))

        return send

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.close()  # the events may not have been asked for
        self.end(ClientDisconnect())

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


async def _error_response(request: Request, error: HTTPException) -> Response:
    return JSONResponse(error_content(error), error.status_code, error.headers)


async def _disconnected(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
