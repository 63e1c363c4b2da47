"""The process of a server: signals, shutdown, and errors of the command."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import llm2slm
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.server import _allow_many_connections, bind
from tests.support.serving import OUTPUTS, read_events, serving, slow, wait_until


def error_text(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was written to stderr, without line breaks."""
    return " ".join(capsys.readouterr().err.split())


class TestShutdown:
    def test_sigterm_finishes_running_requests(self, composite: str) -> None:
        arguments = [composite, "--port", "0", "--name", "tiny"]
        process = subprocess.Popen(
            [sys.executable, "-m", "llm2slm", "serve", *arguments],
            cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("tiny is served at http://127.0.0.1:")
        port = int(line.split(":")[2].split(".")[0])
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

    def test_running_requests_are_ended_after_the_shutdown_timeout(
        self, model: TextToText, prompts: list[str]
    ) -> None:
        with slow(model, 0.1), serving(model, shutdown_timeout=1, max_batch=1) as client:
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
            assert client.service.batcher.tokens < len(OUTPUTS[2].encode())


def test_server_takes_as_many_connections_as_it_may() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        _allow_many_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestCommand:
    def test_error_names_the_fix(
        self, composite: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with bind("127.0.0.1", 0) as taken:
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(SystemExit) as stop:
                llm2slm.main(["serve", composite, "--port", str(port)])
        assert stop.value.code == 1
        assert f"Port {port} is in use: choose another --port." in error_text(capsys)
        with pytest.raises(SystemExit):
            llm2slm.main(["serve", composite, "--host", "192.0.2.1"])
        assert "192.0.2.1:8000 cannot be served on" in error_text(capsys)
        monkeypatch.setitem(sys.modules, "starlette.applications", None)
        for name in ("app", "server"):
            monkeypatch.delitem(sys.modules, f"modeling_llm2slm.serving.{name}")
        with pytest.raises(SystemExit) as stop:
            llm2slm.main(["serve", composite])
        assert stop.value.code == 1
        assert "pip install 'modeling-llm2slm[serve]'" in error_text(capsys)
