"""Functions stay short enough to read."""

from __future__ import annotations

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1]
LONGEST = 80  # lines, the docstring included


def test_functions_have_at_most_80_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for folder in ("modeling_llm2slm", "conversion", "llm2slm")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST
    ]
    assert long == []
