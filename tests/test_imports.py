"""No module imports the package's `__init__`, which exports from every floor; import-linter cannot check this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BUILD_GRAPH = """
import grimp, json
graph = grimp.build_graph("modeling_llm2slm", "llm2slm", cache_dir=None)
print(json.dumps({module: sorted(graph.find_modules_directly_imported_by(module)) for module in graph.modules}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The modules that each module imports, also inside functions and under `TYPE_CHECKING`."""
    tree = tmp_path_factory.mktemp("imports")
    package = tree / "modeling_llm2slm"
    package.mkdir()
    (tree / "llm2slm").symlink_to(ROOT / "llm2slm")
    # setup.cfg maps these two folders into the package.
    for path in (*(ROOT / "modeling_llm2slm").iterdir(), ROOT / "configuration", ROOT / "conversion"):
        (package / path.name).symlink_to(path)
    # A process of its own: grimp looks for packages where they were imported from.
    command = [sys.executable, "-c", BUILD_GRAPH]
    graph: dict[str, list[str]] = json.loads(subprocess.check_output(command, cwd=tree, text=True))
    return graph


def test_graph_contains_every_module(imports: dict[str, list[str]]) -> None:
    assert "modeling_llm2slm.conversion.compose" in imports
    files = [*(ROOT / "modeling_llm2slm").rglob("*.py"), *(ROOT / "conversion").glob("*.py")]
    assert len([module for module in imports if module.startswith("modeling_llm2slm")]) >= len(files)


def test_no_module_imports_the_package_itself(imports: dict[str, list[str]]) -> None:
    importing = [module for module, imported in imports.items() if "modeling_llm2slm" in imported]
    assert [module for module in importing if module.startswith("modeling_llm2slm")] == []
