"""An extension of griffe: docstrings refer to names as in transformers, [`Name`], which Markdown shows as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


REFERENCE = re.compile(r"\[`~?(?:[\w.]*\.)?(\w+)`\](?![\[(])")


class References(Extension):
    """Replace each [`Name`] in a docstring with `Name`."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = REFERENCE.sub(r"`\1`", obj.docstring.value)
