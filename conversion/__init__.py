"""
Conversions of a checkpoint to another form.

Each conversion writes to a temporary folder, loads the result, compares it with its source, and only then replaces the
output folder. All of them return a [`Report`].
"""

from .compose import compose
from .export import export
from .importing import import_encoder_decoder, import_projector
from .lean import full, lean
from .merge import merge
from .report import Report
from .split import split


__all__ = [
    "Report",
    "compose",
    "export",
    "full",
    "import_encoder_decoder",
    "import_projector",
    "lean",
    "merge",
    "split",
]
