"""Make commands from functions: a parameter is an argument or option; a settings class is one option per field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torchquant.cli._explained import explained
from torchquant.runs.settings import HELP


@dataclass(frozen=True)
class Argument:
    """Marks a parameter that is positional on the command line, though it has a default."""

    words: str


@dataclass(frozen=True)
class Count:
    """Marks an option that is a whole number of at least 1."""

    words: str


@dataclass(frozen=True)
class Only:
    """Marks a settings class: which of its fields are options, and the fields with known values."""

    wanted: Callable[[Field[Any]], bool] = lambda entry: True
    known: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def typed(function: Callable[..., object], typer: Any) -> Any:
    """Turn a function into a typer command. Each parameter is annotated with its type and help, or is a settings class.

    A parameter without a default is an argument, any other is an option. The exit status is 1 for a function that
    returns False, and for one that raises; `explained` says why.
    """
    settings: dict[str, tuple[type, Mapping[str, Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *notes = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if is_dataclass(kind):
            assert isinstance(kind, type)
            only = notes[0] if notes else Only()
            found = [_parameter(typer, *asked) for asked in _asked(kind, only)]
            settings[name] = (kind, only.known, [p.name for p in found])
            parameters += found
        else:
            parameters.append(_parameter(typer, name, kind, parameter.default, notes[0]))

    def command(**given: Any) -> None:
        with explained(typer, given.get("out")):
            for name, (kind, known, names) in settings.items():
                given[name] = kind(**known, **{key: given.pop(key) for key in names})
            result = function(**given)
        if result is False:
            raise typer.Exit(1)

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _asked(kind: type, only: Only) -> list[tuple[str, Any, Any, object]]:
    """Name, type, default and help of the fields of a settings class that are options."""
    hints = get_type_hints(kind)
    return [
        (entry.name, hints[entry.name], inspect.Parameter.empty if entry.default is MISSING else entry.default, words)
        for entry in fields(kind)
        if (words := entry.metadata.get(HELP)) and entry.name not in only.known and only.wanted(entry)
    ]


def _parameter(typer: Any, name: str, kind: Any, default: Any, note: object) -> inspect.Parameter:
    if isinstance(note, Argument) or default is inspect.Parameter.empty:
        made = typer.Argument(help=getattr(note, "words", note))
    elif isinstance(note, Count):
        made = typer.Option(help=note.words, min=1)
    else:
        words = name.replace("_", "-")
        flag = (f"--{words}" + (f"/--no-{words}" if default else ""),) if kind is bool else ()
        made = typer.Option(*flag, help=note)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])
