"""The page of the command line: the help of every command, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from docs.site_pages.markdown import table
from torchquant.cli import build_app


def pages() -> dict[str, str]:
    """Make the page: its address in the site -> Markdown."""
    parts = [
        "# Commands",
        "A command that writes a folder resumes where it was stopped when it is run again with the same settings.",
        *_help(get_command(build_app()), "torchquant"),
    ]
    return {"catalogue/commands.md": "\n\n".join(parts) + "\n"}


def _help(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for child in sorted(command.commands):
            yield from _help(command.commands[child], f"{name} {child}")
        return
    yield f"## {name}"
    yield (command.help or "").strip()
    rows = [[f"`{_written(p)}`", getattr(p, "help", None) or "", _default(p)] for p in command.params]
    if rows:
        yield table(("option", "meaning", "default"), rows)


def _written(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return parameter.name.upper()
    return ", ".join((*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    return "" if default is None or callable(default) or isinstance(default, bool) else f"`{default}`"
