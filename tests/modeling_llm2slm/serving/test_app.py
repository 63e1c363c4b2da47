"""The routes, by real requests to a real server: every output under load equals the one alone, and limits hold."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import write_checkpoint
from tests.support.common import PROMPTS
from tests.support.serving import OUTPUTS, Client, hang_up, serving, slow, wait_until


@pytest.fixture(scope="module")
def bounded(model: TextToText) -> Iterator[Client]:
    """A server with limits that are easy to exceed."""
    with serving(model, max_prompt_tokens=30, max_new_tokens=70, max_body=200_000) as client:
        yield client


class TestCompletions:
    def test_response_has_the_format_of_openai(self, client: Client, prompts: list[str]) -> None:
        status, content = client.post(model="tiny", prompt=prompts, user="me", n=1, echo=False)
        assert status == 200
        assert content.pop("id").startswith("cmpl-")
        assert abs(content.pop("created") - time.time()) < 60
        lengths = [len(text.encode()) + 1 for text in OUTPUTS]  # and the end token
        assert content == {
            "object": "text_completion",
            "model": "tiny",
            "choices": [
                {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}
                for index, text in enumerate(OUTPUTS)
            ],
            "usage": {
                "prompt_tokens": sum(map(len, PROMPTS)),
                "completion_tokens": sum(lengths),
                "total_tokens": sum(map(len, PROMPTS)) + sum(lengths),
            },
        }

    def test_concurrent_requests_get_the_outputs_they_get_alone(self, client: Client, prompts: list[str]) -> None:
        limits = [None, 2, 5, 9, 40]
        wanted = [(row, limits[number % 5], number % 2) for number in range(30) for row in [number % 3]]

        def complete(row: int, limit: int | None, stream: int) -> tuple[str, str]:
            fields = {"prompt": prompts[row], **({"max_tokens": limit} if limit else {})}
            if stream:
                choices = [event["choices"][0] for event in client.events(**fields)]
                return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
            choice = client.post(**fields)[1]["choices"][0]
            return choice["text"], choice["finish_reason"]

        alone = {key: complete(*key) for key in set(wanted)}
        batches = client.service.batcher.batches
        with ThreadPoolExecutor(30) as pool:
            together = list(pool.map(lambda key: complete(*key), wanted))
        assert together == [alone[key] for key in wanted]
        assert alone[0, None, 1] == alone[0, None, 0] == (OUTPUTS[0], "stop")
        assert alone[1, 2, 0] == ("n\ufffd", "length")
        assert client.service.batcher.batches - batches <= 10

    def test_stream_joins_to_the_output_and_sends_whole_characters(self, client: Client, prompts: list[str]) -> None:
        for prompt, text in zip(prompts, OUTPUTS, strict=True):
            *events, usage = client.events(prompt=prompt, stream_options={"include_usage": True})
            pieces = [event["choices"][0]["text"] for event in events]
            assert "".join(pieces) == text
            assert "\ufffd" not in "".join(pieces)
            assert len([piece for piece in pieces if piece]) == len(text)
            assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
            assert usage["choices"] == []
            assert usage["usage"] == client.post(prompt=prompt)[1]["usage"]
            assert len({event["id"] for event in [*events, usage]}) == 1

    def test_pieces_and_outputs_arrive_as_soon_as_they_are_generated(
        self, client: Client, model: TextToText, prompts: list[str]
    ) -> None:
        with slow(model, 0.015), ThreadPoolExecutor(2) as pool:
            events = client.events(prompt=prompts[2])
            short = pool.submit(lambda: (client.text(prompt=prompts[1]), client.service.batcher.running))
            first = next(events)
            assert client.service.batcher.batches == 0
            assert short.result() == (OUTPUTS[1], 2)  # the other one is not finished yet
            assert first["choices"][0]["text"] + "".join(e["choices"][0]["text"] for e in events) == OUTPUTS[2]
        wait_until(lambda: client.service.batcher.batches == 1)

    @pytest.mark.parametrize("stop", ["bis", [" bis", "Ende"], ["nowhere", "ß"], "–"])
    def test_output_ends_before_a_stop_text(self, client: Client, prompts: list[str], stop: Any) -> None:
        stops = [stop] if isinstance(stop, str) else stop
        expected = min((OUTPUTS[2].split(each)[0] for each in stops), key=len)
        status, content = client.post(prompt=prompts[2], stop=stop)
        assert content["choices"][0]["text"] == expected
        assert content["choices"][0]["finish_reason"] == "stop"
        assert content["usage"]["completion_tokens"] < len(OUTPUTS[2].encode())
        assert "".join(e["choices"][0]["text"] for e in client.events(prompt=prompts[2], stop=stop)) == expected

    def test_sampled_output_depends_on_its_seed_and_not_on_its_batch(self, client: Client, prompts: list[str]) -> None:
        fields = {"prompt": prompts[0], "temperature": 2, "top_p": 0.95, "max_tokens": 12}
        alone = {seed: client.text(seed=seed, **fields) for seed in range(6)}
        batches = client.service.batcher.batches
        with ThreadPoolExecutor(12) as pool:
            greedy = [pool.submit(client.text, prompt=prompts[row % 3]) for row in range(6)]
            sampled = {seed: pool.submit(client.text, seed=seed, **fields) for seed in range(6)}
            assert {seed: future.result() for seed, future in sampled.items()} == alone
            assert [future.result() for future in greedy] == OUTPUTS * 2
        assert client.service.batcher.batches - batches < 6
        assert len(set(alone.values())) > 3
        assert client.text(prompt=prompts[0], temperature=2, top_p=1e-6) == OUTPUTS[0]

    def test_beam_search_sends_each_output_whole(self, model: TextToText, prompts: list[str]) -> None:
        expected = [model.generate(prompts, num_beams=3, max_new_tokens=limit) for limit in (6, 40)]
        with serving(model, num_beams=3, max_wait=50) as client, ThreadPoolExecutor(6) as pool:
            found = pool.map(
                lambda job: client.text(prompt=job[0], max_tokens=job[1]),
                [(prompt, limit) for limit in (6, 40) for prompt in prompts],
            )
            assert list(found) == [text for row in expected for text in row]
            (event,) = client.events(prompt=prompts[2], max_tokens=40)
            assert event["choices"][0]["text"] == expected[1][2]
            assert client.post(prompt=prompts[0], temperature=1)[0] == 400

    def test_health_models_and_metrics_report_the_service(self, client: Client, prompts: list[str]) -> None:
        client.text(prompt=prompts[1])
        wait_until(lambda: client.service.batcher.running == 0)
        assert json.loads(client.get("/health")) == {"status": "ok", "queue": 0, "running": 0}
        assert [model["id"] for model in json.loads(client.get("/v1/models"))["data"]] == ["tiny"]
        assert "llm2slm_prompts_total 1.0\n" in client.get("/metrics")
        assert "llm2slm_tokens_total 4.0\n" in client.get("/metrics")


class TestBounds:
    @pytest.mark.parametrize(
        ("fields", "status", "message"),
        [
            ({}, 400, "prompt is missing. It must be a string, or a list of 1 to 64 strings"),
            ({"prompt": [1, "a"]}, 400, "prompt.0.1 is 'a', but prompt must be a string, or a list"),
            ({"prompt": [[3], [10**6]]}, 400, "prompt holds the token id 1000000, but ids end at 119"),
            ({"prompt": [[3], []]}, 400, "prompt is empty"),
            ({"prompt": []}, 400, "prompt is [], but it must be a string, or a list"),
            ({"prompt": ["src1"] * 65}, 400, "must be a string, or a list of 1 to 64 strings"),
            ({"prompt": "\ud83d"}, 400, "surrogate"),
            ({"prompt": "src1 " * 31}, 400, "prompt has 32 tokens, but at most 30 are allowed"),
            ({"prompt": "src1", "max_tokens": 0}, 400, "max_tokens is 0, but it must be a whole number from 1 to 70"),
            ({"prompt": "src1", "max_tokens": 71}, 400, "max_tokens is 71"),
            ({"prompt": "src1", "max_tokens": True}, 400, "max_tokens is True"),
            ({"prompt": "src1", "max_tokens": 2.5}, 400, "max_tokens is 2.5"),
            ({"prompt": "src1", "max_tokens": 70}, 400, "64 positions"),
            ({"prompt": "src1", "temperature": -1}, 400, "temperature is -1"),
            ({"prompt": "src1", "temperature": float("nan")}, 400, "temperature is nan"),
            (
                {"prompt": "src1", "temperature": 1e-300},
                400,
                "temperature is 1e-300, but it must be 0, or a number from",
            ),
            ({"prompt": "src1", "temperature": 2.1}, 400, "temperature is 2.1"),
            ({"prompt": "src1", "top_p": 7}, 400, "top_p is 7"),
            ({"prompt": "src1", "temperature": "hot"}, 400, "temperature is 'hot'"),
            ({"prompt": "src1", "top_p": 0}, 400, "top_p is 0, but it must be a number above 0 and at most 1"),
            ({"prompt": "src1", "seed": 1.5}, 400, "seed is 1.5, but it must be a whole number"),
            ({"prompt": "src1", "seed": 2**70}, 400, "64 bits"),
            ({"prompt": "src1", "stream": "yes"}, 400, "stream is 'yes', but it must be true or false"),
            ({"prompt": "src1", "stream_options": {"include_usage": True}}, 400, "stream_options needs a stream"),
            ({"prompt": "src1", "stop": ["a", ""]}, 400, "stop.1 is '', but stop must be a string, or a list"),
            ({"prompt": "src1", "stop": list("abcdefghijklmnopq")}, 400, "up to 16"),
            ({"prompt": "src1", "stream": True, "stream_options": {"n": 1}}, 400, "stream_options.n is 1"),
            ({"prompt": "src1", "n": 65}, 400, "n is 65, but it must be a whole number from 1 to 64"),
            ({"prompt": ["src1"] * 33, "n": 2}, 400, "asks for 66 outputs, but at most 64"),
            ({"prompt": "src1", "logprobs": 21}, 400, "logprobs is 21"),
            ({"prompt": "src1", "logprobs": 1, "echo": True}, 400, "echo and logprobs cannot be combined"),
            ({"prompt": "src1", "top_k": 5}, 400, "top_k is 5, which is not supported"),
            ({"prompt": "src1", "best_off": 3}, 400, "best_off is 3"),
            ({"prompt": "src1", "\ud83d": 3}, 400, "half of a surrogate pair"),
            ({"prompt": "src1", "model": "gpt-5"}, 404, "no model 'gpt-5'. Its model is 'tiny'"),
        ],
    )
    def test_invalid_field_is_refused_with_a_sentence(
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
            (b"[]", 400, "must be a JSON object"),
            (json.dumps({"prompt": "src1 " * 60_000}).encode(), 413, "more than 200,000 bytes"),
        ],
    )
    def test_body_that_is_not_a_request_is_refused(
        self, bounded: Client, content: bytes, status: int, message: str
    ) -> None:
        response = bounded.send(content).getresponse()
        assert response.status == status
        assert message in json.loads(response.read())["error"]["message"]

    @pytest.mark.parametrize(("limit", "status"), [(None, 400), (30, 200)])
    def test_long_prompt_is_refused_and_not_truncated(self, tmp_path: Path, limit: int | None, status: int) -> None:
        path, prompt = write_checkpoint("llm2slm", tmp_path), "src1 src2 src3 src4 src5 src6"
        expected = TextToText.from_pretrained(path).generate([prompt], max_new_tokens=8)[0]
        with serving(TextToText.from_pretrained(path, prompt_max_length=4), max_prompt_tokens=limit) as client:
            found, content = client.post(prompt=prompt, max_tokens=8)
        assert found == status
        if status == 200:
            assert content["choices"][0]["text"] == expected
        else:
            assert "prompt has 7 tokens, but at most 4 are allowed" in content["error"]["message"]

    def test_full_queue_refuses_requests_with_retry_after(self, model: TextToText, prompts: list[str]) -> None:
        with serving(model, max_batch=1, max_queue=2) as client, slow(model, 0.01), ThreadPoolExecutor(4) as pool:
            first = pool.submit(client.text, prompt=prompts[2])
            wait_until(lambda: client.service.batcher.running == 1)
            others = [pool.submit(client.text, prompt=prompts[row]) for row in (0, 1)]
            wait_until(lambda: len(client.service.batcher) == 2)
            assert json.loads(client.get("/health")) == {"status": "ok", "queue": 2, "running": 1}
            response = client.send({"prompt": prompts[0]}).getresponse()
            assert response.status == 503
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            assert "2 prompts are waiting. Try again later." in json.loads(response.read())["error"]["message"]
            assert [future.result() for future in (*others, first)] == OUTPUTS

    def test_burst_is_completed_or_refused_and_the_server_recovers(
        self, model: TextToText, prompts: list[str]
    ) -> None:
        def send(number: int) -> tuple[int, str | None, Any]:
            response = client.send({"prompt": prompts[number % 3], "stream": False}).getresponse()
            return response.status, response.headers["Retry-After"], json.loads(response.read())

        with serving(model, max_batch=2, max_queue=4) as client, slow(model, 0.005), ThreadPoolExecutor(60) as pool:
            found = list(pool.map(send, range(60)))
            assert {status for status, _, _ in found} == {200, 503}
            for number, (status, retry_after, content) in enumerate(found):
                if status == 200:
                    assert content["choices"][0]["text"] == OUTPUTS[number % 3]
                else:
                    assert 1 <= int(retry_after or 0) <= 60
            assert client.text(prompt=prompts[1]) == OUTPUTS[1]
            wait_until(lambda: not client.service.open and client.service.batcher.running == 0)
            assert client.service.batcher._entering == []

    def test_request_fails_after_its_timeout(self, model: TextToText, prompts: list[str]) -> None:
        with serving(model, timeout=0.3) as client, slow(model, 0.1):
            status, content = client.post(prompt=prompts[2])
            assert status == 504
            assert content["error"]["message"] == "The completion was not finished in time."
            wait_until(lambda: client.service.batcher.running == 0)
            *_, last = client.events(prompt=prompts[2])
            assert last["error"]["message"] == "The completion was not finished in time."
            with socket.create_connection(("127.0.0.1", client.port)) as half:
                half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
                assert half.recv(100).startswith(b"HTTP/1.1 408")

    def test_nothing_is_generated_for_disconnected_clients(self, model: TextToText, prompts: list[str]) -> None:
        with serving(model, max_batch=1, max_queue=2) as client, slow(model, 0.05):
            batcher = client.service.batcher
            for stream in (True, False):
                connection = client.send({"prompt": prompts[2], "stream": stream})
                wait_until(lambda: batcher.running == 1)
                waiting = [client.send({"prompt": prompts[0], "stream": not stream}) for _ in range(2)]
                wait_until(lambda: len(batcher) == 2)
                for disconnecting in waiting:
                    hang_up(disconnecting)
                wait_until(lambda: len(client.service.open) == 1)
                last = client.send({"prompt": [prompts[1]] * 2, "max_tokens": 1})  # in place of the disconnected
                wait_until(lambda: len(client.service.open) == 2)
                assert batcher.running == 1
                hang_up(connection)
                assert last.getresponse().status == 200
                wait_until(lambda: batcher.running == 0)
            assert batcher.tokens < len(OUTPUTS[2].encode())
            assert batcher.batches == 2 + 4  # none of the prompts that waited

    def test_failing_prompt_fails_no_other(
        self, model: TextToText, prompts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = type(model).read

        def failing(self: Any, features: Any) -> Any:
            if PROMPTS[1] in features["input_ids"]:
                raise RuntimeError("out of\nluck")
            return read(self, features)

        monkeypatch.setattr(type(model), "read", failing)
        with serving(model, max_wait=100) as client, ThreadPoolExecutor(3) as pool:
            good = [pool.submit(client.text, prompt=prompts[row]) for row in (0, 2)]
            status, content = client.post(prompt=prompts[1])
            assert status == 500
            assert content["error"] == {
                "message": "The model failed: out of luck", "type": "server_error", "param": None, "code": None,
            }  # fmt: skip
            assert [future.result() for future in good] == [OUTPUTS[0], OUTPUTS[2]]
            assert client.text(prompt=prompts[0]) == OUTPUTS[0]
            wait_until(lambda: client.service.batcher.running == 0)
            assert "llm2slm_failed_total 1.0\n" in client.get("/metrics")
            assert "llm2slm_prompts_total 3.0\n" in client.get("/metrics")

    def test_requests_that_need_too_many_positions_together_get_batches_of_their_own(self, model: TextToText) -> None:
        long, short = " ".join(["src1"] * 50), "src2"
        expected = [model.generate([long], max_new_tokens=10)[0], model.generate([short], max_new_tokens=55)[0]]
        with serving(model, max_wait=100) as client, ThreadPoolExecutor(4) as pool:
            jobs = [(long, 10), (short, 55)] * 2
            found = list(pool.map(lambda job: client.text(prompt=job[0], max_tokens=job[1]), jobs))
            wait_until(lambda: client.service.batcher.prompts == 4)
            assert client.service.batcher.batches == 2
        assert found == expected * 2
