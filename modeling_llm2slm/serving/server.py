"""The process around the HTTP application: its socket, its start, and its shutdown by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable
from typing import Any

from ..inference.text_to_text import TextToText
from ..settings import PlaygroundSettings, ServeSettings


try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]
try:
    import uvicorn

    from .app import Service
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[serve]'") from error


def bind(host: str, port: int) -> socket.socket:
    """
    Return a socket for the server, which does not listen yet.

    Args:
        host: The address; `0.0.0.0` is every IPv4 address of the machine.
        port: The port; 0 takes a free one.

    Raises:
        OSError: If the address cannot be used.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"Port {port} is in use: choose another --port.") from error
        message = f"{host}:{port} cannot be served on: {error.strerror}. Choose another --port or --host."
        raise OSError(message) from error
    return sock


def make_server(
    service: Service, ready: Callable[[], None] = lambda: None, mount: Callable[[Any], None] = lambda app: None
) -> uvicorn.Server:
    """
    Return a server for a service.

    Args:
        service: The service.
        ready: Called when the server takes requests.
        mount: Adds routes to the application.
    """
    app = service.app()
    mount(app)

    patience = service.settings.shutdown_timeout or service.settings.timeout

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(patience, service.abandon)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, lifespan="on", ws="none", log_level="warning", access_log=False,
        timeout_keep_alive=75,  # longer than clients keep an idle connection, or they send into a closed one
        timeout_graceful_shutdown=round(patience) + 5,  # for requests sent only in part
    )  # fmt: skip
    return Server(config)


def serve(
    text_to_text: TextToText,
    settings: ServeSettings,
    sock: socket.socket,
    ready: Callable[[], None] = lambda: None,
    page: PlaygroundSettings | None = None,
) -> None:
    """
    Serve a model until the process gets SIGTERM or SIGINT. Then refuse new requests and finish accepted ones.

    Args:
        text_to_text: The model.
        settings: Settings and limits of the server.
        sock: A socket from [`bind`].
        ready: Called when the server takes requests.
        page: Settings of the playground. Default: none is served.

    Raises:
        ImportError: If the playground is wanted, and gradio is not installed.
        OSError: If the LLM or the examples that `page` names cannot be read.
        ValueError: If `page` wants a playground, and the model is not an LLM-to-SLM model.

    Example:

        >>> settings = ServeSettings(name="my-model")
        >>> serve(TextToText.from_pretrained("runs/model"), settings, bind("127.0.0.1", 8000))
    """
    _allow_many_connections()
    service = Service(text_to_text, settings)
    if page is not None and page.playground:
        from .playground.page import make_playground

        server = make_server(service, ready, make_playground(service, page).mount)
    else:
        server = make_server(service, ready)

    def stop(*_: Any) -> None:
        server.should_exit = True

    # When it ends, uvicorn raises the signal again for the handlers that were set before. They would make the process
    # fail although it stopped as it was told to, so they are replaced until then.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _allow_many_connections() -> None:
    """Raise the number of files, each connection one, that this process may open, as far as its user may raise it."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS names a limit that it does not allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
