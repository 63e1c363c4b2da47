"""The page as the server sends it, without a browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import llm2slm
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.serving.app import Service
from modeling_llm2slm.serving.playground.llm import ComparedLLM
from modeling_llm2slm.settings import PlaygroundSettings, ServeSettings


pytest.importorskip("gradio")
from starlette.testclient import TestClient  # noqa: E402 - it needs httpx, which gradio installs

from modeling_llm2slm.serving.playground import page  # noqa: E402 - needs gradio


def test_page_is_served_next_to_the_api_and_needs_no_other_host(load: Callable[[str], TextToText]) -> None:
    service = Service(load("llm2slm"), ServeSettings(name="<tiny>"))
    playground = page.Playground(service, ComparedLLM(reason="Only LLM-to-SLM is shown."), ["src1 src2"])
    app = service.app()
    playground.mount(app)
    with TestClient(app) as client:
        redirect = client.get("/", follow_redirects=False)
        assert redirect.headers["location"] == "playground/"
        html, theme = client.get("/playground/").text, client.get("/playground/theme.css").text
        assert client.get("/health").json()["status"] == "ok"
        assert "choices" in client.post("/v1/completions", json={"prompt": "src1", "max_tokens": 2}).json()
        *_, (verdict, outputs) = playground.compare("src1 src2", 3, 0.5, 1, 0)
    assert "&lt;tiny&gt;" in html
    assert "Only LLM-to-SLM is shown." in html
    assert re.findall(r"(?:src|href)=\"(?:https?:)?//[^\"]+", html) == []
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]+|@import[^;]+", theme) == []
    assert "LLM-to-SLM took" in verdict
    assert "LLM encoding" in outputs


def test_examples_are_the_first_prompts_of_a_file(tmp_path: Path, load: Callable[[str], TextToText]) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"src{number}\n" for number in range(9)), encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    service = Service(load("llm2slm"), ServeSettings(name="tiny"))
    settings = PlaygroundSettings(playground=True, examples=str(tmp_path / "prompts.txt"))
    assert page.make_playground(service, settings).examples == [f"src{number}" for number in range(6)]
    with pytest.raises(ValueError, match="holds no prompts"):
        page.make_playground(service, PlaygroundSettings(examples=str(tmp_path / "empty.txt")))


def test_options_of_the_page_need_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        llm2slm.main(["serve", "model", "--llm", "llm"])
    assert stopped.value.code == 2
    assert "--llm belongs to --playground." in " ".join(capsys.readouterr().err.split())
