"""A server in a thread, its client, and a model that knows some outputs by heart."""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, T5EncoderModel

from modeling_llm2slm import LLM2SLMProcessor
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.app import Service
from modeling_llm2slm.serving.server import bind, make_server
from modeling_llm2slm.settings import ServeSettings
from tests.support.common import compose, gpt2_config, learn_by_heart, llm_tokenizer, t5_config
from tests.support.families import LLM_VOCAB_SIZE


# Every byte is a token, so that most letters and signs are several tokens.
OUTPUTS = ["Größe 😀 ja", "nö", "Übermäßig weit , bis 𝄞 – Ende"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte of `OUTPUTS`; its last id is the end token."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted({letter for text in OUTPUTS for part, _ in bytes_of.pre_tokenize_str(text) for letter in part})
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = bytes_of, decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<end>")


def served_model() -> TextToText:
    """Return a composite that knows `OUTPUTS` by heart."""
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    ids = [[*tokenizer(text)["input_ids"], end] for text in OUTPUTS]
    labels = torch.full((len(ids), max(map(len, ids))), -100)
    for row, tokens in enumerate(ids):
        labels[row, : len(tokens)] = torch.tensor(tokens)
    slm = GPT2LMHeadModel(gpt2_config(vocab_size=end + 1, bos_token_id=end, eos_token_id=end)).eval()
    parts = compose(T5EncoderModel(t5_config(vocab_size=LLM_VOCAB_SIZE)).eval(), slm, "replace")
    learn_by_heart(parts.model, labels=labels)
    with tempfile.TemporaryDirectory() as folder:
        parts.model.save_pretrained(folder)
        LLM2SLMProcessor(llm_tokenizer(), tokenizer).save_pretrained(folder)
        return TextToText.from_pretrained(folder, target_max_length=50)


@dataclass
class Client:
    """Sends requests to a server."""

    service: Service
    port: int
    server: Any

    def send(self, content: Any, path: str = "/v1/completions", method: str = "POST") -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection

    def post(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        connection = self.send(fields)
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        return response.status, content

    def text(self, **fields: Any) -> str:
        status, content = self.post(**fields)
        assert status == 200, content
        return content["choices"][0]["text"]

    def events(self, **fields: Any) -> Iterator[dict[str, Any]]:
        connection = self.send({"stream": True, **fields})
        response = connection.getresponse()
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield from read_events(response)
        connection.close()

    def get(self, path: str) -> Any:
        connection = self.send(b"", path, "GET")
        return connection.getresponse().read().decode()


def read_events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the server-sent events of a response, which must end with `[DONE]`."""
    for line in response:
        if line.strip() == b"data: [DONE]":
            assert response.read().strip() == b""
            return
        if line.strip():
            yield json.loads(line.removeprefix(b"data: "))
    raise AssertionError("the stream has no [DONE]")


@contextmanager
def serving(model: TextToText, **settings: Any) -> Iterator[Client]:
    """Serve a model from a thread, with some [`ServeSettings`]."""
    service = Service(model, ServeSettings(name="tiny", **settings))
    sock, ready = bind("127.0.0.1", 0), threading.Event()
    server = make_server(service, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    port = sock.getsockname()[1]
    thread.start()
    assert ready.wait(10)
    try:
        yield Client(service, port, server)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def slow(model: TextToText, seconds: float = 0.03) -> Iterator[None]:
    """Make every step of the decoder take this long."""
    handle = model.model.decoder.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def hang_up(connection: http.client.HTTPConnection) -> None:
    """Close a connection before its response."""
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def wait_until(reached: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until a function returns something true; fail after this many seconds."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached within {seconds} s"
        time.sleep(0.002)
