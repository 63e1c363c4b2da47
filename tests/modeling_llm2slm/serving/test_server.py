"""`llm2slm serve`, by real requests to a real server: answers under load are those alone, and every bound holds."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, T5EncoderModel

import llm2slm
from modeling_llm2slm import LLM2SLMProcessor
from modeling_llm2slm.inference.text_to_text import EncoderDecoderTextToText, LLM2SLMTextToText, TextToText
from modeling_llm2slm.serving.scheduler import Batcher, Decoding, Job, Piece, QueueFull
from modeling_llm2slm.serving.server import ServeSettings, Service, bind, make_server
from tests.support.checkpoints import KINDS, write_checkpoint
from tests.support.checkpoints import PROMPTS as WORDS
from tests.support.common import PROMPTS, compose, gpt2_config, learn_by_heart, llm_tokenizer, t5_config
from tests.support.families import LLM_VOCAB_SIZE


# Every byte is a token, so that letters and signs come in halves and quarters.
ANSWERS = ["Größe 😀 ja", "nö", "Übermäßig weit , bis 𝄞 – Ende"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte of `ANSWERS`, the last id is the end."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted({letter for text in ANSWERS for part, _ in bytes_of.pre_tokenize_str(text) for letter in part})
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = bytes_of, decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<end>")


@pytest.fixture(scope="module")
def model() -> TextToText:
    """A composite that has learned `ANSWERS` by heart."""
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    ids = [[*tokenizer(text)["input_ids"], end] for text in ANSWERS]
    labels = torch.full((len(ids), max(map(len, ids))), -100)
    for row, answer in enumerate(ids):
        labels[row, : len(answer)] = torch.tensor(answer)
    slm = GPT2LMHeadModel(gpt2_config(vocab_size=end + 1, bos_token_id=end, eos_token_id=end)).eval()
    parts = compose(T5EncoderModel(t5_config(vocab_size=LLM_VOCAB_SIZE)).eval(), slm, "replace")
    learn_by_heart(parts.model, labels=labels)
    processor = LLM2SLMProcessor(llm_tokenizer(), tokenizer)
    return LLM2SLMTextToText(parts.model.eval(), processor, target_max_length=50)


@pytest.fixture(scope="module")
def prompts(model: TextToText) -> list[str]:
    """The prompts that `ANSWERS` were learned for."""
    texts = [model.processor.tokenizer.decode(ids[:-1]) for ids in PROMPTS]
    assert model.generate(texts) == ANSWERS
    return texts


@dataclass
class Client:
    """Requests to a server."""

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
    for line in response:
        if line.strip() == b"data: [DONE]":
            assert response.read().strip() == b""
            return
        if line.strip():
            yield json.loads(line.removeprefix(b"data: "))
    raise AssertionError("the stream has no end")


@contextmanager
def serving(model: TextToText, **settings: Any) -> Iterator[Client]:
    service, sock, ready = Service(model, ServeSettings("tiny", **settings)), bind("127.0.0.1", 0), threading.Event()
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


@pytest.fixture
def client(model: TextToText) -> Iterator[Client]:
    with serving(model, max_wait=0.03) as client:
        yield client


@pytest.fixture(scope="module")
def bounded(model: TextToText) -> Iterator[Client]:
    with serving(model, max_prompt_tokens=30, max_new_tokens=70, max_body=200_000) as client:
        yield client


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("served"))


@contextmanager
def slow(model: TextToText, seconds: float = 0.03) -> Iterator[None]:
    """Every step of the decoder takes a while."""
    handle = model.model.decoder.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def hang_up(connection: http.client.HTTPConnection) -> None:
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def wait_until(reached: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.002)


class TestAnswers:
    def test_a_response_is_what_clients_of_openai_read(self, client: Client, prompts: list[str]) -> None:
        status, content = client.post(model="tiny", prompt=prompts, user="me", n=1, echo=False)
        assert status == 200
        assert content.pop("id").startswith("cmpl-")
        assert abs(content.pop("created") - time.time()) < 60
        lengths = [len(text.encode()) + 1 for text in ANSWERS]  # and the end token
        assert content == {
            "object": "text_completion",
            "model": "tiny",
            "choices": [
                {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}
                for index, text in enumerate(ANSWERS)
            ],
            "usage": {
                "prompt_tokens": sum(map(len, PROMPTS)),
                "completion_tokens": sum(lengths),
                "total_tokens": sum(map(len, PROMPTS)) + sum(lengths),
            },
        }

    def test_requests_at_once_have_the_answers_they_have_alone(self, client: Client, prompts: list[str]) -> None:
        limits = [None, 2, 5, 9, 40]
        wanted = [(row, limits[number % 5], number % 2) for number in range(30) for row in [number % 3]]

        def ask(row: int, limit: int | None, stream: int) -> tuple[str, str]:
            fields = {"prompt": prompts[row], **({"max_tokens": limit} if limit else {})}
            if stream:
                choices = [event["choices"][0] for event in client.events(**fields)]
                return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
            choice = client.post(**fields)[1]["choices"][0]
            return choice["text"], choice["finish_reason"]

        alone = {key: ask(*key) for key in set(wanted)}
        batches = client.service.batcher.batches
        with ThreadPoolExecutor(30) as pool:
            together = list(pool.map(lambda key: ask(*key), wanted))
        assert together == [alone[key] for key in wanted]
        assert alone[0, None, 1] == alone[0, None, 0] == (ANSWERS[0], "stop")
        assert alone[1, 2, 0] == ("n\ufffd", "length")
        assert client.service.batcher.batches - batches <= 10

    def test_a_stream_is_the_answer_in_whole_characters(self, client: Client, prompts: list[str]) -> None:
        for prompt, text in zip(prompts, ANSWERS, strict=True):
            *events, usage = client.events(prompt=prompt, stream_options={"include_usage": True})
            pieces = [event["choices"][0]["text"] for event in events]
            assert "".join(pieces) == text
            assert "\ufffd" not in "".join(pieces)
            assert len([piece for piece in pieces if piece]) == len(text.replace(" ", ""))
            assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
            assert usage["choices"] == []
            assert usage["usage"] == client.post(prompt=prompt)[1]["usage"]
            assert len({event["id"] for event in [*events, usage]}) == 1

    def test_pieces_and_answers_come_when_they_are_written(
        self, client: Client, model: TextToText, prompts: list[str]
    ) -> None:
        with slow(model, 0.015), ThreadPoolExecutor(2) as pool:
            events = client.events(prompt=prompts[2])
            short = pool.submit(lambda: (client.text(prompt=prompts[1]), client.service.batcher.running))
            first = next(events)
            assert client.service.batcher.batches == 0
            assert short.result() == (ANSWERS[1], 2)  # the other is not done yet
            assert first["choices"][0]["text"] + "".join(e["choices"][0]["text"] for e in events) == ANSWERS[2]
        wait_until(lambda: client.service.batcher.batches == 1)

    @pytest.mark.parametrize("stop", ["bis", [" bis", "Ende"], ["nowhere", "ß"], "–"])
    def test_an_answer_ends_before_a_text_to_stop_at(self, client: Client, prompts: list[str], stop: Any) -> None:
        stops = [stop] if isinstance(stop, str) else stop
        expected = min((ANSWERS[2].split(each)[0] for each in stops), key=len)
        status, content = client.post(prompt=prompts[2], stop=stop)
        assert content["choices"][0]["text"] == expected
        assert content["choices"][0]["finish_reason"] == "stop"
        assert content["usage"]["completion_tokens"] < len(ANSWERS[2].encode())
        assert "".join(e["choices"][0]["text"] for e in client.events(prompt=prompts[2], stop=stop)) == expected

    def test_samples_depend_on_their_seed_and_not_on_their_neighbours(
        self, client: Client, prompts: list[str]
    ) -> None:
        fields = {"prompt": prompts[0], "temperature": 2, "top_p": 0.95, "max_tokens": 12}
        alone = {seed: client.text(seed=seed, **fields) for seed in range(6)}
        batches = client.service.batcher.batches
        with ThreadPoolExecutor(12) as pool:
            greedy = [pool.submit(client.text, prompt=prompts[row % 3]) for row in range(6)]
            sampled = {seed: pool.submit(client.text, seed=seed, **fields) for seed in range(6)}
            assert {seed: future.result() for seed, future in sampled.items()} == alone
            assert [future.result() for future in greedy] == ANSWERS * 2
        assert client.service.batcher.batches - batches < 6
        assert len(set(alone.values())) > 3
        assert client.text(prompt=prompts[0], temperature=2, top_p=1e-6) == ANSWERS[0]

    def test_beams_are_answered_whole(self, model: TextToText, prompts: list[str]) -> None:
        expected = [model.generate(prompts, num_beams=3, max_new_tokens=limit) for limit in (6, 40)]
        with serving(model, num_beams=3, max_wait=0.05) as client, ThreadPoolExecutor(6) as pool:
            found = pool.map(
                lambda job: client.text(prompt=job[0], max_tokens=job[1]),
                [(prompt, limit) for limit in (6, 40) for prompt in prompts],
            )
            assert list(found) == [text for row in expected for text in row]
            (event,) = client.events(prompt=prompts[2], max_tokens=40)
            assert event["choices"][0]["text"] == expected[1][2]
            assert client.post(prompt=prompts[0], temperature=1)[0] == 400

    def test_who_is_there_and_what_was_done(self, client: Client, prompts: list[str]) -> None:
        client.text(prompt=prompts[1])
        wait_until(lambda: client.service.batcher.running == 0)
        assert json.loads(client.get("/health")) == {"status": "ok", "queue": 0, "running": 0}
        assert [model["id"] for model in json.loads(client.get("/v1/models"))["data"]] == ["tiny"]
        assert "llm2slm_prompts_total 1\n" in client.get("/metrics")
        assert "llm2slm_tokens_total 4\n" in client.get("/metrics")


class TestBounds:
    @pytest.mark.parametrize(
        ("fields", "status", "message"),
        [
            ({}, 400, "prompt is neither a text nor a list of texts"),
            ({"prompt": [1, 2]}, 400, "prompt is neither"),
            ({"prompt": []}, 400, "prompt is neither"),
            ({"prompt": ["src1"] * 65}, 400, "at most 64"),
            ({"prompt": "\ud83d"}, 400, "surrogate"),
            ({"prompt": "src1 " * 31}, 400, "prompt has 32 tokens, but at most 30 are taken"),
            ({"prompt": "src1", "max_tokens": 0}, 400, "max_tokens is 0, but it must be a whole number from 1 to 70"),
            ({"prompt": "src1", "max_tokens": 71}, 400, "max_tokens is 71"),
            ({"prompt": "src1", "max_tokens": True}, 400, "max_tokens is True"),
            ({"prompt": "src1", "max_tokens": 2.5}, 400, "max_tokens is 2.5"),
            ({"prompt": "src1", "max_tokens": 70}, 400, "64 positions"),
            ({"prompt": "src1", "temperature": -1}, 400, "temperature is -1"),
            ({"prompt": "src1", "temperature": float("nan")}, 400, "temperature is nan"),
            ({"prompt": "src1", "temperature": "hot"}, 400, "temperature is 'hot'"),
            ({"prompt": "src1", "top_p": 0}, 400, "top_p is 0"),
            ({"prompt": "src1", "seed": 1.5}, 400, "seed is 1.5, but it must be a whole number"),
            ({"prompt": "src1", "seed": 2**70}, 400, "64 bits"),
            ({"prompt": "src1", "stream": "yes"}, 400, "stream is 'yes', but it must be true or false"),
            ({"prompt": "src1", "stream_options": {"include_usage": True}}, 400, "stream_options"),
            ({"prompt": "src1", "stop": ["a", ""]}, 400, "stop is neither"),
            ({"prompt": "src1", "stop": list("abcde")}, 400, "up to 4"),
            ({"prompt": "src1", "n": 2}, 400, "n is 2, which is not supported"),
            ({"prompt": "src1", "logprobs": 3}, 400, "logprobs is 3"),
            ({"prompt": "src1", "best_off": 3}, 400, "best_off is 3"),
            ({"prompt": "src1", "\ud83d": 3}, 400, r"\ud83d is 3, which is not supported"),
            ({"prompt": "src1", "model": "gpt-5"}, 404, "no model 'gpt-5' here, only 'tiny'"),
        ],
    )
    def test_what_is_not_in_order_is_refused_in_a_sentence(
        self, bounded: Client, fields: dict[str, Any], status: int, message: str
    ) -> None:
        found, content = bounded.post(**fields)
        assert found == status
        assert message in content["error"]["message"]
        assert content["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        ("content", "status", "message"),
        [
            (b"{", 400, "not JSON"),
            (b"[" * 100_000, 400, "not JSON"),
            (b"\xff", 400, "not JSON"),
            (b"[]", 400, "no JSON object"),
            (json.dumps({"prompt": "src1 " * 60_000}).encode(), 413, "more than 200,000 bytes"),
        ],
    )
    def test_what_is_no_request_is_refused(self, bounded: Client, content: bytes, status: int, message: str) -> None:
        response = bounded.send(content).getresponse()
        assert response.status == status
        assert message in json.loads(response.read())["error"]["message"]

    @pytest.mark.parametrize(("limit", "status"), [(None, 400), (30, 200)])
    def test_a_prompt_is_refused_and_not_cut(self, tmp_path: Path, limit: int | None, status: int) -> None:
        path, prompt = write_checkpoint("llm2slm", tmp_path), "src1 src2 src3 src4 src5 src6"
        expected = TextToText.from_pretrained(path).generate([prompt], max_new_tokens=8)[0]
        with serving(TextToText.from_pretrained(path, prompt_max_length=4), max_prompt_tokens=limit) as client:
            found, content = client.post(prompt=prompt, max_tokens=8)
        assert found == status
        if status == 200:
            assert content["choices"][0]["text"] == expected
        else:
            assert "prompt has 7 tokens, but at most 4 are taken" in content["error"]["message"]

    def test_a_full_queue_says_when_to_come_again(self, model: TextToText, prompts: list[str]) -> None:
        with serving(model, max_batch=1, max_queue=2) as client, slow(model, 0.01), ThreadPoolExecutor(4) as pool:
            first = pool.submit(client.text, prompt=prompts[2])
            wait_until(lambda: client.service.batcher.running == 1)
            others = [pool.submit(client.text, prompt=prompts[row]) for row in (0, 1)]
            wait_until(lambda: len(client.service.batcher) == 2)
            assert json.loads(client.get("/health")) == {"status": "ok", "queue": 2, "running": 1}
            response = client.send({"prompt": prompts[0]}).getresponse()
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert "2 prompts are waiting" in json.loads(response.read())["error"]["message"]
            assert [future.result() for future in (*others, first)] == ANSWERS

    def test_a_request_has_its_time(self, model: TextToText, prompts: list[str]) -> None:
        with serving(model, timeout=0.3) as client, slow(model, 0.1):
            status, content = client.post(prompt=prompts[2])
            assert status == 504
            assert content["error"]["message"] == "The answer was not finished in time."
            wait_until(lambda: client.service.batcher.running == 0)
            *_, last = client.events(prompt=prompts[2])
            assert last["error"]["message"] == "The answer was not finished in time."
            with socket.create_connection(("127.0.0.1", client.port)) as half:
                half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
                assert half.recv(100).startswith(b"HTTP/1.1 408")

    def test_nothing_is_written_for_clients_that_have_gone(self, model: TextToText, prompts: list[str]) -> None:
        with serving(model, max_batch=1, max_queue=2) as client, slow(model, 0.05):
            batcher = client.service.batcher
            for stream in (True, False):
                connection = client.send({"prompt": prompts[2], "stream": stream})
                wait_until(lambda: batcher.running == 1)
                waiting = [client.send({"prompt": prompts[0], "stream": not stream}) for _ in range(2)]
                wait_until(lambda: len(batcher) == 2)
                for gone in waiting:
                    hang_up(gone)
                wait_until(lambda: len(client.service.open) == 1)
                last = client.send({"prompt": [prompts[1]] * 2, "max_tokens": 1})  # in place of those that have gone
                wait_until(lambda: len(client.service.open) == 2)
                assert batcher.running == 1
                hang_up(connection)
                assert last.getresponse().status == 200
                wait_until(lambda: batcher.running == 0)
            assert batcher.tokens < len(ANSWERS[2].encode())
            assert batcher.batches == 2 + 4  # nothing of those that waited

    def test_a_prompt_that_fails_spoils_no_other(
        self, model: TextToText, prompts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = EncoderDecoderTextToText.read

        def failing(self: Any, features: Any) -> Any:
            if PROMPTS[1] in features["input_ids"]:
                raise RuntimeError("out of\nluck")
            return read(self, features)

        monkeypatch.setattr(EncoderDecoderTextToText, "read", failing)
        with serving(model, max_wait=0.1) as client, ThreadPoolExecutor(3) as pool:
            good = [pool.submit(client.text, prompt=prompts[row]) for row in (0, 2)]
            status, content = client.post(prompt=prompts[1])
            assert status == 500
            assert content["error"] == {
                "message": "The model failed: out of luck", "type": "server_error", "param": None, "code": None,
            }  # fmt: skip
            assert [future.result() for future in good] == [ANSWERS[0], ANSWERS[2]]
            assert client.text(prompt=prompts[0]) == ANSWERS[0]
            assert "llm2slm_failed_total 1\n" in client.get("/metrics")
            assert "llm2slm_prompts_total 3\n" in client.get("/metrics")

    def test_requests_that_need_too_many_positions_together_are_answered_apart(self, model: TextToText) -> None:
        long, short = " ".join(["src1"] * 50), "src2"
        expected = [model.generate([long], max_new_tokens=10)[0], model.generate([short], max_new_tokens=55)[0]]
        with serving(model, max_wait=0.1) as client, ThreadPoolExecutor(4) as pool:
            jobs = [(long, 10), (short, 55)] * 2
            found = list(pool.map(lambda job: client.text(prompt=job[0], max_tokens=job[1]), jobs))
            wait_until(lambda: client.service.batcher.prompts == 4)
            assert client.service.batcher.batches == 2
        assert found == expected * 2


class TestBatcher:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_checkpoint_is_served(self, kind: str, tmp_path: Path) -> None:
        model = TextToText.from_pretrained(write_checkpoint(kind, tmp_path))
        limits = [3, 9, 5, 12, 1, 7, 20, 4]
        expected = [
            model.generate([prompt], max_new_tokens=limit)[0] for prompt, limit in zip(WORDS, limits, strict=True)
        ]
        found: dict[int, list[Any]] = {row: [] for row in range(len(WORDS))}
        jobs = [
            Job(ids, Decoding(limit), found[row].append, stream=row % 2 == 0)
            for row, (ids, limit) in enumerate(zip(model.features(WORDS)["input_ids"], limits, strict=True))
        ]
        batcher = Batcher(model)
        batcher.submit(jobs)
        batcher.start()
        wait_until(lambda: batcher.batches == 1)
        assert ["".join(piece.text for piece in found[row]) for row in found] == expected
        assert [found[row][-1].tokens for row in found] == limits
        assert all(found[row][-1].finish_reason == "length" for row in found)
        batcher.stop()
        with pytest.raises(QueueFull):
            batcher.submit(jobs)

    def test_a_batch_waits_for_others_but_not_when_it_is_full(self, model: TextToText, prompts: list[str]) -> None:
        ids = model.features(prompts)["input_ids"]
        batcher = Batcher(model, max_batch=2, max_wait=30)
        batcher.start()
        done: list[Piece | Exception] = []
        batcher.submit([Job(ids[1], Decoding(4), done.append)])
        time.sleep(0.05)
        assert batcher.running == 0
        batcher.submit([Job(ids[1], Decoding(4), done.append)])
        wait_until(lambda: len(done) == 2, seconds=5)
        batcher.stop()


class TestCommand:
    def test_sigterm_finishes_what_runs(self, composite: str) -> None:
        words = [composite, "--port", "0", "--name", "tiny"]
        process = subprocess.Popen(
            [sys.executable, "-m", "llm2slm", "serve", *words],
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("tiny is served at http://127.0.0.1:")
        port = int(said.split(":")[2].split(".")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"prompt": "src1 src2", "max_tokens": 50, "stream": True})
        connection.request("POST", "/v1/completions", body)
        events = read_events(connection.getresponse())
        text = next(events)["choices"][0]["text"]
        process.send_signal(signal.SIGTERM)
        text += "".join(event["choices"][0]["text"] for event in events)
        assert text == TextToText.from_pretrained(composite).generate(["src1 src2"], max_new_tokens=50)[0]
        assert process.wait(15) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)

    def test_what_runs_at_the_end_has_its_time(self, model: TextToText, prompts: list[str]) -> None:
        with slow(model, 0.1), serving(model, shutdown_timeout=0.5, max_batch=1) as client:
            connections = [client.send({"prompt": prompts[2], "stream": stream}) for stream in (True, False)]
            wait_until(lambda: client.service.batcher.running == len(client.service.batcher) == 1)
            client.server.should_exit = True
            response = connections[1].getresponse()
            assert response.status == 503
            assert "The server was stopped" in json.loads(response.read())["error"]["message"]
            *pieces, last = read_events(connections[0].getresponse())
            assert "The server was stopped" in last["error"]["message"]
            assert len(pieces) >= 3
            wait_until(lambda: client.service.batcher.running == 0)
            assert client.service.batcher.tokens < len(ANSWERS[2].encode())

    def test_what_is_missing_is_said_in_a_sentence(
        self, composite: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(llm2slm, "err", llm2slm.Console(stderr=True, width=200))
        with bind("127.0.0.1", 0) as taken:
            taken.listen()
            with pytest.raises(SystemExit) as stop:
                llm2slm.main(["serve", composite, "--port", str(taken.getsockname()[1])])
        assert stop.value.code == 1
        assert "cannot be served on: Address already in use. Choose another --port" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "starlette.applications", None)
        monkeypatch.delitem(sys.modules, "modeling_llm2slm.serving.server")
        with pytest.raises(SystemExit) as stop:
            llm2slm.main(["serve", composite])
        assert stop.value.code == 1
        assert "pip install 'modeling-llm2slm[serve]'" in capsys.readouterr().err
