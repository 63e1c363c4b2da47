"""An extension of griffe that reads docstrings written as in transformers."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


REFERENCE = re.compile(r"\[`~?(?:[\w.]*\.)?(\w+)`\](?![\[(])")  # [`Name`], [`~package.Name`]
ARGUMENT = re.compile(r"^( +\*{0,2}\w+ )\((.+)\):", re.MULTILINE)  # name (`int`, *optional*, defaults to 2):


class TransformersDocstrings(Extension):
    """Show references as code, and types of arguments without markup."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = REFERENCE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = ARGUMENT.sub(lambda found: f"{found[1]}({re.sub('[`*]', '', found[2])}):", text)
