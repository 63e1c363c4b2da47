"""Command-line options: those of settings classes, generated from their fields, and those that commands share."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer


SETTINGS = "modeling_llm2slm.settings"
SettingsT = TypeVar("SettingsT")
# Former names of options, which scripts may still use.
FORMER_NAMES = {
    "answer-column": "target-column",
    "answer-max-length": "target-max-length",
    "timed-answers": "timed-outputs",
}

ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint: a folder, or a name on the Hub.", show_default=False)
]
OutputArgument = Annotated[Path, typer.Argument(help="The folder to write to.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")]
ResultFile = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]


def normalize_name(name: str) -> str:
    """Return the name of an option in kebab-case; underscores and former names are accepted too."""
    name = name.replace("_", "-")
    return FORMER_NAMES.get(name, name)


def load_module(name: str) -> ModuleType:
    """
    Import one module of `modeling_llm2slm` without the package, which imports torch and takes seconds.

    The module is registered under its own name, so that a later import of the package finds the same classes.

    Args:
        name: `modeling_llm2slm.settings`, or a module that imports nothing else of the package.
    """
    if name in sys.modules or "modeling_llm2slm" in sys.modules:
        return import_module(name)
    if name != SETTINGS:
        load_module(SETTINGS)
    package, *path = name.split(".")
    root = find_spec(package)
    if root is None or root.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    spec = spec_from_file_location(name, Path(root.origin).parent.joinpath(*path).with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Give a command one option for each field of the settings that it takes.

    Every parameter that is annotated with a class of `modeling_llm2slm.settings` is replaced by options with the type,
    default, bounds, help and panel of the fields; the command gets the object. Fields with `cli=False` keep their
    default.

    Raises:
        typer.BadParameter: When the command runs, if a value is refused by the settings class.
    """
    settings = load_module(SETTINGS)
    signature = inspect.signature(command, eval_str=True, locals=vars(settings))
    own = [parameter for parameter in signature.parameters.values() if not _is_settings(parameter.annotation)]
    classes = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if _is_settings(parameter.annotation)
    }
    names = {name: [field.name for field in _option_fields(kind)] for name, kind in classes.items()}

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        objects = {
            name: _create(kind, {key: values.pop(key) for key in names[name]}) for name, kind in classes.items()
        }
        return command(**values, **objects)

    options = [parameter for kind in classes.values() for parameter in settings_parameters(kind)]
    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in [*own, *options]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def settings_parameters(kind: type) -> list[inspect.Parameter]:
    """Return a parameter, as typer reads it, for each field of a settings class that is an option."""
    types = get_type_hints(kind)
    return [_parameter(field, types[field.name]) for field in _option_fields(kind)]


def _is_settings(annotation: Any) -> bool:
    return is_dataclass(annotation) and isinstance(annotation, type)


def _option_fields(kind: Any) -> list[Field[Any]]:
    return [field for field in fields(kind) if field.metadata.get("cli", True)]


def _parameter(field: Field[Any], annotation: Any) -> inspect.Parameter:
    metadata: Mapping[str, Any] = field.metadata
    option = f"--{field.name.replace('_', '-')}"
    choices = metadata.get("choices")
    annotation = next((kind | None for kind in get_args(annotation) if get_origin(kind) is list), annotation)
    if choices is not None:
        annotation = Literal[tuple(choices)] | None if field.default is None else Literal[tuple(choices)]
    info = typer.Option(
        option,  # alone: a switch gets no --no-... of its own
        help=metadata["help"],
        min=metadata.get("minimum"),
        max=metadata.get("maximum"),  # a technical limit is not shown; the settings class checks it
        rich_help_panel=metadata.get("panel"),
        show_default=field.default not in (None, "", False),
    )
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def _create(kind: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    try:
        return kind(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line, rather than at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raise `typer.BadParameter`, with the reason, if one of the options is on the command line."""
    for name in names:
        if is_given(context, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}.")


def extra_options(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield name, in snake_case, and value of `--name value`, `--name=value` and, for a switch, `--name` alone."""
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise typer.BadParameter(f"{word!r} does not belong to an option; write --name value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            has_value = position + 1 < len(words) and not words[position + 1].startswith("--")
            value = words[position + 1] if has_value else "true"
            position += has_value
        yield normalize_name(name).replace("-", "_"), value
        position += 1
