"""The description of the API: an OpenAPI document, and a page of it that needs neither scripts nor a network."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .responses import ChatCompletion, ChatCompletionChunk, Completion, ErrorResponse, Model, ModelList
from .schema import ANYTHING, NEUTRAL, ChatRequest, CompletionRequest, GenerationRequest, Limits


REFERENCE = "#/components/schemas/{model}"
REFUSALS = {
    "400": "A field is wrong: `param` names it.", "404": "There is no such model.",
    "408": "It did not arrive in time.", "413": "It has too many bytes.", "500": "The model failed.",
    "503": "The queue is full, or the outputs would not be finished in time: `Retry-After` has seconds.",
    "504": "The outputs were not finished in time.",
}  # fmt: skip
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:.1em .3em;border-radius:.2em}table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;vertical-align:top;padding:.3em .6em;border-top:1px solid #8886}"
    ":root{color-scheme:light dark}"
)


def api_description(limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI document of a server with these limits."""
    requests: list[type[GenerationRequest]] = [CompletionRequest, ChatRequest]
    responses: list[type[BaseModel]] = [
        Completion, ChatCompletion, ChatCompletionChunk, Model, ModelList, ErrorResponse
    ]  # fmt: skip
    inputs: Any = [(model, "validation") for model in requests] + [(model, "serialization") for model in responses]
    _, definitions = models_json_schema(inputs, ref_template=REFERENCE)
    schemas = definitions["$defs"]
    for request in requests:
        _complete(schemas[request.__name__], request, limits)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{limits.model}, served by llm2slm", "version": version("modeling-llm2slm")},
        "paths": {
            "/v1/completions": _post("Generate for one or more prompts.", CompletionRequest, Completion, Completion),
            "/v1/chat/completions": _post(
                "Generate the next message of a conversation.", ChatRequest, ChatCompletion, ChatCompletionChunk
            ),
            "/v1/models": _get("The model that is served.", _json(ModelList)),
            "/v1/models/{name}": _get("One model.", _json(Model), "name"),
            "/health": _get("How many outputs wait, and how many run.", {"application/json": {}}),
            "/metrics": _get("Counters and gauges for Prometheus.", {"text/plain": {}}),
        },
        "components": {"schemas": schemas},
    }


def _complete(schema: dict[str, Any], request: type[GenerationRequest], limits: Limits) -> None:
    """Write the limits into the descriptions of the fields, and add the fields with neutral values."""
    properties = schema["properties"]
    for field in properties.values():
        if "description" in field:
            text = field["description"].format(**asdict(limits))
            field["description"] = f"{text[:1].upper()}{text[1:]}."
    if "prompt" in properties:  # one prompt is a list with one
        properties["prompt"]["oneOf"] += [{"type": "string"}, properties["prompt"]["oneOf"][1]["items"]]
    for name, values in NEUTRAL.items():
        if name not in properties and values is ANYTHING:
            properties[name] = {"description": "Accepted, without effect."}
        elif name not in properties and values is not None:
            properties[name] = {"enum": [None, *values], "description": "Only values without effect are accepted."}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}


def _post(summary: str, request: type[BaseModel], whole: type[BaseModel], event: type[BaseModel]) -> dict[str, Any]:
    stream = {"text/event-stream": {"schema": {"$ref": REFERENCE.format(model=event.__name__)}}}
    refusals = {status: {"description": text, "content": _json(ErrorResponse)} for status, text in REFUSALS.items()}
    found = {
        "description": "The outputs, or with `stream` one event for each piece.",
        "content": _json(whole) | stream,
    }
    body = {"required": True, "content": _json(request)}
    return {"post": {"summary": summary, "requestBody": body, "responses": {"200": found, **refusals}}}


def _get(summary: str, content: dict[str, Any], *parameters: str) -> dict[str, Any]:
    named = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters]
    return {
        "get": {
            "summary": summary,
            "parameters": named,
            "responses": {"200": {"description": summary, "content": content}},
        }
    }


def docs_page(description: dict[str, Any]) -> str:
    """Return an OpenAPI document as a page in HTML."""
    title = html.escape(description["info"]["title"])
    parts = [f"<h1>{title}</h1><p>OpenAPI document: <a href='openapi.json'>openapi.json</a></p>"]
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(route['summary'])}</p>"
            )
            if "requestBody" in route:
                parts.append(_fields_table(description, route["requestBody"]))
                rows = [(status, found["description"]) for status, found in route["responses"].items()]
                parts.append(_table(("status", "meaning"), rows))
    body = "".join(parts)
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>"


def _fields_table(description: dict[str, Any], body: dict[str, Any]) -> str:
    name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = description["components"]["schemas"][name]
    rows = []
    for field, known in schema["properties"].items():
        values = ", ".join(json.dumps(value) for value in known.get("enum", ())[1:])
        needed = " Required." if field in schema.get("required", ()) else ""
        rows.append((field, f"{known['description']}{f' {values}' if values else ''}{needed}"))
    return _table(("field", "value"), rows)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(text)}</td></tr>" for name, text in rows]
    return f"<table><tr><th>{head[0]}</th><th>{head[1]}</th></tr>{''.join(lines)}</table>"
