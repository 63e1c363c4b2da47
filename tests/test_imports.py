"""Modules import one another in no circle, and a folder imports only from the floors below it."""

from __future__ import annotations

import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# From the lowest to the highest. The model's files and their settings are the ground floor.
FLOORS = (
    "data", "states", "inference", "engines", "serving", "evaluation", "training", "conversion", "workflows",
    "benchmark",
)  # fmt: skip
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


def floor(module: str) -> int:
    """Return how high the folder of a module is: 0 for the model's files."""
    top, _, rest = module.partition(".")
    if top == "llm2slm":
        return len(FLOORS) + 1
    folder = rest.split(".")[0]
    if folder.endswith("_llm2slm") or folder in ("settings", "configuration"):
        return 0
    assert folder in FLOORS, f"{module} is on no floor"
    return FLOORS.index(folder) + 1


def test_graph_contains_every_module(imports: dict[str, list[str]]) -> None:
    assert "modeling_llm2slm.conversion.compose" in imports
    files = [*(ROOT / "modeling_llm2slm").rglob("*.py"), *(ROOT / "conversion").glob("*.py")]
    assert len([module for module in imports if module.startswith("modeling_llm2slm")]) >= len(files)


def test_modules_import_one_another_in_no_circle(imports: dict[str, list[str]]) -> None:
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_module_imports_only_from_the_floors_below_it(imports: dict[str, list[str]]) -> None:
    # The package's __init__ exports from every floor, so only the console command may import it.
    package, command = "modeling_llm2slm", "llm2slm"
    upward = [
        f"{module} imports {imported}"
        for module, all_imported in imports.items()
        if module != package and module.split(".")[0] != command
        for imported in all_imported
        if imported == package or floor(imported) > floor(module)
    ]
    assert upward == []
