"""The distribution: its metadata, the files in the wheel, and the facts that files of the repository state."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).resolve().parent.parent
NAME = "modeling-llm2slm"


def declared() -> dict[str, Requirement]:
    """Return the requirements of the installed distribution, with those of extras, by name."""
    requirements = [Requirement(line) for line in metadata.requires(NAME) or []]
    return {requirement.name.lower(): requirement for requirement in requirements if requirement.name != NAME}


def pinned(lines: str) -> dict[str, Version]:
    """Return the versions in a text of `name==version` lines."""
    return {name.lower(): Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)$", lines, re.MULTILINE)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from a copy of the source tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("llm2slm", "modeling_llm2slm", "configuration", "conversion", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return set(zipfile.ZipFile(next(target.glob("*.whl"))).namelist())


def test_nothing_generic_lands_at_the_top_of_site_packages(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"modeling_llm2slm", "llm2slm"}


def test_the_wheel_holds_every_source_and_data_file(wheel: set[str]) -> None:
    expected = {"modeling_llm2slm/py.typed"}
    for package in ("llm2slm", "modeling_llm2slm"):
        files = [path for path in (ROOT / package).rglob("*") if path.suffix in {".py", ".css", ".js"}]
        expected |= {path.relative_to(ROOT).as_posix() for path in files}
    for folder in ("configuration", "conversion"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".json", ".yaml"}]
        expected |= {f"modeling_llm2slm/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_presets_and_recipes_are_found_through_the_package() -> None:
    configuration = resources.files("modeling_llm2slm.configuration")
    presets = {path.name for path in configuration.iterdir() if path.name.endswith(".json")}
    assert presets == {path.name for path in (ROOT / "configuration").glob("*.json")} != set()
    assert any(path.name.endswith(".yaml") for path in (configuration / "recipes").iterdir())
    assert (resources.files("modeling_llm2slm") / "py.typed").is_file()


def test_no_top_level_configuration_is_importable(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('configuration'), u.find_spec('conversion'))"
    script = [sys.executable, "-I", "-c", code]
    result = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["None", "None"]
    assert find_spec("modeling_llm2slm.conversion") is not None


def test_metadata_are_those_of_setup_cfg() -> None:
    about = metadata.metadata(NAME)
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert about["Version"] == config["metadata"]["version"]
    (command,) = metadata.entry_points(group="console_scripts", name="llm2slm")
    assert command.value == "llm2slm:main"
    assert callable(command.load())


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in declared().values():
        assert any(bound.operator == ">=" for bound in requirement.specifier), str(requirement)


def imported(paths: Iterable[Path]) -> set[str]:
    """Return the distributions that the files import, as `metadata` names them."""
    distributions = metadata.packages_distributions()
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.split(".")[0])
    own = {"llm2slm", "modeling_llm2slm"} | sys.stdlib_module_names
    # A package that is not installed here goes by the name of its module.
    distributions = {"llama_cpp": ["llama-cpp-python"], **distributions}
    return {distributions.get(module, [module])[0].lower().replace("_", "-") for module in modules - own}


def of_extras(*extras: str) -> set[str]:
    """Return the names of the requirements that extras declare themselves."""
    markers = [f'extra == "{name}"' for name in extras]
    requirements = [Requirement(line) for line in metadata.requires(NAME) or []]
    return {need.name.lower() for need in requirements if any(marker in str(need.marker) for marker in markers)}


def test_what_is_imported_is_declared() -> None:
    base = {name for name, requirement in declared().items() if requirement.marker is None}
    train, engines = of_extras("train"), of_extras("openvino", "onnx", "vllm", "quantization")
    optional = engines | of_extras("serve", "playground", "benchmark", "llama-cpp", "lm-eval", "ray")
    uploaded = set((ROOT / "modeling_llm2slm").glob("*_llm2slm.py"))
    packages = ("llm2slm", "modeling_llm2slm", "conversion")
    files = {path for package in packages for path in (ROOT / package).rglob("*.py")}
    assert imported(uploaded) <= base
    # Trainer imports accelerate by itself, and models are saved and loaded with safetensors.
    found = imported(files) | {"accelerate", "safetensors"}
    assert base | train <= found
    # pydantic installs its own version of pydantic-core, and huggingface-hub installs filelock.
    assert found <= base | train | optional | {"pydantic-core", "filelock"}
    assert any(Requirement(line).name == "filelock" for line in metadata.requires("huggingface-hub") or [])


def test_constraints_lie_within_the_declared_ranges() -> None:
    requirements = declared()
    for name, version in pinned((ROOT / "constraints.txt").read_text()).items():
        assert requirements[name].specifier.contains(version), f"{name}=={version}"


def test_lowest_versions_covers_every_dependency() -> None:
    script = [sys.executable, str(ROOT / ".ci" / "lowest_versions.py"), str(ROOT / "setup.cfg")]
    lowest = pinned(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert lowest.keys() == declared().keys()
    assert lowest["torch"] == Version("2.13.0")
    assert Version("5.15") <= lowest["transformers"] < Version("5.18")


def test_citation_names_the_paper_and_the_software() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"] == NAME
    assert citation["license"] == "Apache-2.0"
    assert len(citation["preferred-citation"]["authors"]) == 6
    assert {"type": "other", "value": "arXiv:2402.16844"} in citation["preferred-citation"]["identifiers"]


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == targets
