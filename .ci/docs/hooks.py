"""
Hooks of MkDocs: what the site takes from the code and from files outside `docs/`.

The home page is the README. One page for each command, the tables of recipe fields and settings come from the code:
a page asks for a table with `<!-- generated: NAME -->`. A link to a file outside `docs/`, such as
`../../benchmarks/serving.py`, works in the repository; the site gets a copy of that file.
"""

from __future__ import annotations

import inspect
import json
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import llm2slm
from llm2slm.options import load_module


ROOT = Path(__file__).resolve().parents[2]
PACKAGE_COPY = ROOT / "build" / "docs" / "modeling_llm2slm"
COMMANDS = "reference/commands"
LINK = re.compile(r"\]\(((?:\.\./)*[\w./-]+)(#[\w-]*)?\)")
FIELD_HEAD = ("type", "default", "description")
REQUIRED = object()
GENERATED = re.compile(r"<!-- generated: ([\w-]+) -->")


def on_startup(command: str, dirty: bool) -> None:
    """Create the folder of the package's copy: mkdocstrings leaves out a search path that does not exist yet."""
    PACKAGE_COPY.mkdir(parents=True, exist_ok=True)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the package as it is installed, and list the pages of the commands in the navigation."""
    copy_package(PACKAGE_COPY)
    for section in config.nav or []:
        for entry in section.get("Reference", []):
            if "Command line" in entry:
                entry["Command line"] = [{name: f"{COMMANDS}/{slug(name)}.md"} for name, _ in commands()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page and one page for each command."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for name, command in commands():
        page = command_page(name, command)
        files.append(File.generated(config, f"{COMMANDS}/{slug(name)}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated tables, and copy the files outside `docs/` that the page links to."""
    markdown = GENERATED.sub(lambda found: TABLES[found[1]](), markdown)

    def copied(found: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri) if page.file.src_uri != "index.md" else ".."
        target = posixpath.normpath(posixpath.join("docs", folder, found[1]))
        source = ROOT / target
        if target.startswith("docs/") or not source.is_file():
            return found[0]
        uri = f"source/{target}" + (".txt" if source.suffix in ("", ".md") else "")
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        return f"]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(copied, markdown)


def copy_package(folder: Path) -> None:
    """Copy the sources in the shape of the installed package, for griffe to read."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "modeling_llm2slm", folder, ignore=ignore)
    shutil.copytree(ROOT / "conversion", folder / "conversion", ignore=ignore)


def commands() -> list[tuple[str, Any]]:
    """All commands of the command line with their full names, such as `llm2slm convert lean`."""

    def walk(name: str, command: Any) -> Iterable[tuple[str, Any]]:
        children = getattr(command, "commands", None)
        if children is None:
            yield name, command
        for child, subcommand in sorted((children or {}).items()):
            yield from walk(f"{name} {child}", subcommand)

    return list(walk("llm2slm", typer.main.get_command(llm2slm.app)))


def slug(name: str) -> str:
    return name.removeprefix("llm2slm ").replace(" ", "-")


def command_page(name: str, command: Any) -> str:
    """The page of a command: its help and its options, in the groups of the help."""
    options = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    groups: dict[str, list[Any]] = {}
    for parameter in options:
        arguments = parameter.param_type_name == "argument"
        group = "Arguments" if arguments else getattr(parameter, "rich_help_panel", None) or "Options"
        groups.setdefault(group, []).append(parameter)
    lines = [f"# {name}", "", inspect.cleandoc(command.help or ""), ""]
    for group, parameters in groups.items():
        rows = [(usage(parameter), default_of(parameter), parameter.help or "") for parameter in parameters]
        lines += [f"## {group}", "", table(("name", "default", "description"), rows), ""]
    return "\n".join(lines)


def usage(parameter: Any) -> str:
    """How a parameter is written on the command line, with the type of its value."""
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name or '').upper()}`" + (" ..." if parameter.nargs == -1 else "")
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} {value_type(parameter)}"


def value_type(parameter: Any) -> str:
    """The type of an option's value: text, int, float, path or its choices."""
    annotation = parameter.type_descriptor.annotation
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    return {"str": "text"}.get(annotation.__name__, annotation.__name__.lower())


def default_of(parameter: Any) -> str:
    default = parameter.default() if callable(parameter.default) else parameter.default
    if parameter.required:
        return "required"
    return "" if default in (None, False, (), []) or "Sentinel" in type(default).__name__ else f"`{default}`"


def settings_tables() -> str:
    """One table for each settings class: every setting with its type, default and bounds."""
    settings = load_module("modeling_llm2slm.settings")
    parts = []
    for name, found in vars(settings).items():
        if inspect.isclass(found) and issubclass(found, settings.Settings) and found is not settings.Settings:
            rows = [
                field_row(
                    item.name,
                    item.type.removesuffix(" | None"),
                    default_value(item),
                    item.metadata["help"],
                    limits_of(item.metadata),
                )
                for item in fields(found)
            ]
            summary = inspect.cleandoc(found.__doc__ or "")
            parts.append(f"## {name}\n\n{summary}\n\n{table(('setting', *FIELD_HEAD), rows)}")
    return "\n\n".join(parts)


def default_value(item: Any) -> Any:
    if item.default is not MISSING:
        return item.default
    return REQUIRED if item.default_factory is MISSING else item.default_factory()


def limits_of(metadata: Mapping[str, Any]) -> list[str]:
    """What the values of a setting are limited to."""
    words = {"minimum": "at least", "maximum": "at most", "above": "above"}
    limits = [f"{word} {metadata[key]}" for key, word in words.items() if key in metadata]
    return limits + ([f"one of {', '.join(metadata['choices'])}"] if metadata.get("choices") else [])


def recipe_tables() -> str:
    """One table for each group of a recipe's fields, from its schema, the Trainer's last."""
    recipe = load_module("modeling_llm2slm.training.recipe")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for item in (*recipe.recipe_fields(), *recipe.recipe_fields(trainer=True)):
        default = REQUIRED if item.required else item.default
        groups.setdefault(item.group, []).append(field_row(item.name, item.type, default, item.description))
    return "\n\n".join(f"## {group}\n\n{table(('field', *FIELD_HEAD), rows)}" for group, rows in groups.items())


def field_row(name: str, kind: str, default: Any, description: str, limits: Iterable[str] = ()) -> tuple[str, ...]:
    """The row of a setting or of a recipe's field. A table cell cannot hold the sign of a union."""
    types = " or ".join(f"`{part}`" for part in kind.split(" | "))
    return f"`{name}`", ", ".join([types, *limits]), "required" if default is REQUIRED else shown(default), description


def shown(default: Any) -> str:
    """A default as YAML has it; empty where there is none."""
    return "" if default is None or default == {} else f"`{json.dumps(default, default=str)}`".replace('"', "")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; cells are one line each."""
    cells = [tuple(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in (head, tuple("---" for _ in head), *cells)]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"settings": settings_tables, "recipe": recipe_tables}
os.environ.setdefault("TERM", "dumb")
