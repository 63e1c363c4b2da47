"""
The HTTP server as an application of Ray Serve, with replicas that follow the load.

`serve run configuration/ray/serve.yaml` starts it; each replica has the routes of `llm2slm serve`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..inference.text_to_text import TextToText
from ..settings import LoadSettings, ServeSettings, unknown_name


try:
    from ray import serve

    from .app import Service
except ImportError as error:
    raise ImportError(f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[ray]'") from error


@serve.deployment(name="llm2slm")
@serve.ingress()
class Replica:
    """
    A model with the routes of the HTTP server.

    Args:
        model: The checkpoint, a folder or a name on the Hub. It must exist on every node.
        settings: Settings and limits of the server.
        loading: How to load the model.
    """

    def __init__(self, model: str, settings: ServeSettings, loading: LoadSettings):
        options = {field.name: getattr(loading, field.name) for field in fields(loading)}
        self.service = Service(TextToText.from_pretrained(model, **options), settings)

    def __serve_build_asgi_app__(self) -> Any:
        return self.service.app()


def build(arguments: dict[str, Any]) -> serve.Application:
    """
    Return the application: the `import_path` of a config file of Ray Serve.

    Args:
        arguments: The `args` of the config file: `model`, and any fields of [`ServeSettings`] and [`LoadSettings`].

    Raises:
        ValueError: If `model` is missing, or a field does not exist or has a value out of bounds.
    """
    given = dict(arguments)
    model = given.pop("model", None)
    if not isinstance(model, str):
        raise ValueError("The args of the application need a model: a folder, or a name on the Hub.")
    settings = {field.name: given.pop(field.name) for field in fields(ServeSettings) if field.name in given}
    loading = {field.name: given.pop(field.name) for field in fields(LoadSettings) if field.name in given}
    if given:
        known = [field.name for kind in (ServeSettings, LoadSettings) for field in fields(kind)]
        raise ValueError(unknown_name("The application", next(iter(given)), known))
    settings = {**settings, "name": settings.get("name") or Path(model).name}
    deployment: Any = Replica  # as its decorators return it
    return deployment.bind(model, ServeSettings(**settings), LoadSettings(**loading))
