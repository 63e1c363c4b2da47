"""The page, built with gradio. It needs nothing from other hosts: no fonts, no scripts, no telemetry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Route

from ...data.formats import parse_rows
from ...settings import PlaygroundSettings
from ..app import Service
from ..jobs import Decoding
from .comparison import Comparison
from .html import outputs_html, verdict_html
from .llm import ComparedLLM, load_llm


try:
    import gradio
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[playground]'") from error


HERE = Path(__file__).parent
PATH = "/playground"
SHOWN_EXAMPLES = 6
MAX_TEMPERATURE = 2.0  # as in the API
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
INTRODUCTION = """
<h1>{name}</h1>
<p>A large frozen model reads your prompt once, and a small model writes the output. Compare it with the large model
that does both.</p>
"""
NOTE = """
<p>The models take turns, so that neither slows the other down. Times run from the start of reading to the last token,
on this server; its other requests count. Decoding is greedy at temperature 0.</p>
"""


class Playground:
    """
    The page of a server.

    Args:
        service: The server of an LLM-to-SLM model.
        llm: The LLM that it is compared with.
        examples: Prompts to choose from.
    """

    def __init__(self, service: Service, llm: ComparedLLM, examples: Sequence[str] = ()):
        self.service = service
        self.comparison = Comparison(service, llm)
        self.examples = list(examples)
        self.blocks = self._blocks()

    def mount(self, app: Any) -> None:
        """Add the page to the server's application, at `/playground/`; `/` leads to it."""
        own = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            async with own(app) as state:
                self.comparison.start()
                try:
                    yield state
                finally:
                    self.comparison.stop()

        app.router.lifespan_context = lifespan
        app.router.routes.append(Route("/", _to_page))
        parts = {part: (HERE / f"page.{part}").read_text("utf-8") for part in ("css", "js")}
        options = {"footer_links": [], "run_history": False, "ssr_mode": False}
        gradio.mount_gradio_app(app, self.blocks, PATH, theme=_theme(), **parts, **options)

    def compare(
        self, prompt: str, max_tokens: float, temperature: float, top_p: float, seed: float | None
    ) -> Iterator[tuple[str, str]]:
        """Yield the two parts of the page that change, the verdict and the outputs, while the models generate."""
        decoding = Decoding(int(max_tokens), float(temperature), float(top_p), None if seed is None else int(seed))
        outputs: dict[str, Any] = {}
        for outputs in self.comparison.run(prompt or "", decoding):
            yield verdict_html(outputs, running=True), outputs_html(self.comparison, outputs, running=True)
        yield verdict_html(outputs), outputs_html(self.comparison, outputs)

    def _blocks(self) -> Any:
        name = self.service.settings.name
        with gradio.Blocks(title=f"{name} – LLM-to-SLM playground", analytics_enabled=False) as blocks:
            gradio.HTML(INTRODUCTION.format(name=escape(name)), elem_id="introduction")
            prompt = gradio.Textbox(
                label="Prompt", info="Shift + Enter compares.", lines=2, max_lines=8, autofocus=True, elem_id="prompt"
            )
            if self.examples:
                gradio.Examples(self.examples, prompt, label="Examples", elem_id="examples")
            settings = self._settings()
            with gradio.Row(elem_id="buttons"):
                action = "Compare" if len(self.comparison.contestants) > 1 else "Generate"
                run = gradio.Button(action, variant="primary", scale=4, min_width=160)
                stop = gradio.Button("Stop", scale=1, min_width=80)
            verdict = gradio.HTML(verdict_html({}), elem_id="verdict")
            outputs = gradio.HTML(outputs_html(self.comparison, {}), elem_id="outputs")
            gradio.HTML(NOTE, elem_id="note")
            events, inputs = [run.click, prompt.submit], [prompt, *settings]
            options = {"concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
            running = gradio.on(events, self.compare, inputs, [verdict, outputs], **options)
            stop.click(None, cancels=[running], api_visibility="private")
        return blocks.queue(max_size=self.service.settings.max_queue)

    def _settings(self) -> list[Any]:
        """Return the controls of `max_tokens`, `temperature`, `top_p` and `seed`."""
        samples = self.service.settings.num_beams == 1
        longest = self.service.limits.max_tokens
        with gradio.Accordion("Settings", open=False, elem_id="settings"), gradio.Row():
            return [
                gradio.Slider(1, longest, self.service.default_tokens, step=1, label="Maximum tokens"),
                gradio.Slider(0, MAX_TEMPERATURE, 0, step=0.05, label="Temperature", visible=samples),
                gradio.Slider(0.05, 1.0, 1, step=0.05, label="Top-p", visible=samples),
                gradio.Number(0, precision=0, label="Seed of sampling", visible=samples),
            ]


def _theme() -> Any:
    """Return a theme of the system's fonts, with texts of enough contrast."""
    font = gradio.themes.Font
    fonts: dict[str, Any] = {
        "font": [font(name) for name in FONTS],
        "font_mono": [font("ui-monospace"), font("monospace")],
    }
    theme = gradio.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts)
    subdued, button = ("body_text_color_subdued", "block_info_text_color"), "button_primary_background_fill"
    return theme.set(
        body_background_fill="*neutral_50",
        **dict.fromkeys(subdued, "*neutral_500"),
        **{f"{name}_dark": "*neutral_400" for name in subdued},
        **dict.fromkeys((button, f"{button}_dark"), "*primary_700"),
        **{f"{button}_hover": "*primary_800", f"{button}_hover_dark": "*primary_600"},
    )


def make_playground(service: Service, settings: PlaygroundSettings) -> Playground:
    """Return the page; load the LLM, on the device of the model, and read the example prompts."""
    examples = _examples(settings.examples)
    device = getattr(service.text_to_text.model, "device", "cpu")
    return Playground(service, load_llm(service.text_to_text, settings.llm, device), examples)


def _examples(file: str | None) -> list[str]:
    """
    Return the first prompts of a file.

    Raises:
        ValueError: If it has none.
    """
    if file is None:
        return []
    rows = parse_rows(Path(file), SHOWN_EXAMPLES)
    prompts = [text for row in rows if isinstance(text := row.get("prompt", row.get("text")), str)]
    if not prompts:
        raise ValueError(f"{file} holds no prompts. Take a .txt, or a .jsonl with the column prompt.")
    return prompts


async def _to_page(request: Request) -> RedirectResponse:
    return RedirectResponse(f"{PATH.removeprefix('/')}/")  # relative, so that it works behind any proxy
