"""
Everything that turns one form of a checkpoint into another.

Each conversion writes beside its output first, loads what it wrote, compares it with what it came from, and only then
puts it in place. All return a [`Report`].
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
