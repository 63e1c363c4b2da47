"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm.conversion.build import build
from tests.support.checkpoints import write_checkpoint, write_parts
from tests.support.common import llm_tokenizer


CHROMIUM = shutil.which("chromium")
pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
ROOT = Path(__file__).parents[4]
PATIENCE = 120_000  # ms, for a busy machine
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PROMPT = "src1 src2 src3"
# Controls without a name that a screen reader could say.
UNNAMED = """[...document.querySelectorAll('input, textarea, button')].filter(one => one.offsetParent &&
    !(one.labels?.length || one.ariaLabel || one.innerText.trim() || one.title)).map(one => one.outerHTML)"""


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `llm2slm serve` in a process; yield it and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llm2slm", "serve", "--port", "0", "--playground", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert " Open http://127.0.0.1:" in line
        yield process, line.split(" Open ")[1].split("playground/")[0]
    finally:
        process.kill()
        process.wait()


def write_twelve_words(path: str) -> None:
    """Make each output of a checkpoint twelve tokens of text."""
    file = Path(path) / "generation_config.json"
    values, special = json.loads(file.read_text(encoding="utf-8")), llm_tokenizer().all_special_ids
    file.write_text(json.dumps({**values, "max_new_tokens": 12, "suppress_tokens": special}), encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a composite that names its LLM."""
    folder = tmp_path_factory.mktemp("played")
    llm = write_checkpoint("llm", folder / "llm")
    _, slm, tokenizer = write_parts(folder)
    build(llm, slm, slm_tokenizer=tokenizer).save_pretrained(folder / "model")
    for path in (llm, str(folder / "model")):
        write_twelve_words(path)
    (folder / "prompts.txt").write_text("src4 src5\nsrc6\n", encoding="utf-8")
    return str(folder / "model")


@pytest.fixture(scope="module")
def address(model: str) -> Iterator[str]:
    """The address of a server."""
    with serving(model, "--examples", str(Path(model).parent / "prompts.txt")) as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """Yield a page that is loaded; fail if it asks another host or raises an error."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    others, errors = [], []
    page.on("request", lambda request: others.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_label("Prompt").wait_for()
    yield page
    context.close()
    assert [url for url in others if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def tab_to(page: Any, text: str) -> None:
    """Press the Tab key until the element with this text has the focus."""
    for _ in range(25):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText").startswith(text):
            return
    raise AssertionError(f"{text} cannot be reached with the Tab key")


def wait_for(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
    )


def test_both_models_stream_and_the_factor_is_shown(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        assert page.url == f"{address}playground/"
        page.get_by_role("button", name="src4 src5").click()
        page.wait_for_function("document.querySelector('#prompt textarea').value === 'src4 src5'")
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("button", name="Compare").click()
        wait_for(page, "#verdict", "×")
        assert page.locator("#verdict").get_attribute("aria-live") == "polite"
        for name in ("LLM-to-SLM", "LLM"):
            card = page.get_by_role("region", name=name, exact=True)
            assert "src" in card.locator(".text").inner_text()
            assert card.locator(".empty, .error").count() == 0
            assert card.locator("dd").nth(1).inner_text() == "12"
            assert float(card.locator("dd").nth(2).inner_text().replace(",", "")) > 0
        assert "projection" in page.get_by_role("region", name="Time by stage").inner_text()
        page.get_by_label("Prompt").fill(" ")
        page.get_by_role("button", name="Compare").click()
        wait_for(page, "#outputs", "The prompt is empty. Type one.")


def test_the_page_works_by_keyboard_alone(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.wait_for_function("document.activeElement?.matches('#prompt textarea')")
        page.keyboard.type(PROMPT)
        tab_to(page, "Settings")
        page.keyboard.press("Enter")
        page.get_by_label("Temperature").first.wait_for()
        assert page.evaluate(UNNAMED) == []
        tab_to(page, "Compare")
        page.keyboard.press("Enter")
        wait_for(page, "#verdict", "×")
        page.get_by_label("Prompt").focus()
        page.keyboard.press("Shift+Enter")
        wait_for(page, "#verdict", "generating")
        wait_for(page, "#verdict", "×")


def test_the_page_fits_a_phone(browser: Any, address: str) -> None:
    phone = {"viewport": {"width": 375, "height": 700}, "is_mobile": True, "has_touch": True}
    with opened(browser, address, **phone) as page:
        page.get_by_label("Prompt").fill(f"{PROMPT} {'src7' * 30}")
        page.get_by_role("button", name="Settings").tap()
        page.get_by_role("button", name="Compare").tap()
        wait_for(page, "#verdict", "×")
        assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_server_that_is_gone_is_named_until_it_is_back(browser: Any, model: str) -> None:
    with serving(model) as (process, address), opened(browser, address) as page:
        assert page.locator("#server-gone").inner_text() == ""
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0  # an open page does not hold it up
        alert = page.get_by_role("alert").filter(has_text="The server does not respond")
        alert.wait_for()
        port = address.rsplit(":", 1)[1].strip("/")
        with serving(model, "--port", port):
            alert.wait_for(state="hidden")
            page.get_by_label("Prompt").fill(PROMPT)
            page.get_by_role("button", name="Compare").click()
            wait_for(page, "#verdict", "×")
