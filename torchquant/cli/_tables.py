"""Show a catalogue on the terminal, all of it or one entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchquant.errors import require


def show_all(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Show a table with one line per row, column -> text."""
    table = require("rich.table", "cli").Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    require("rich.console", "cli").Console().print(table)


def show_one(entry: Mapping[str, str], title: str | None = None) -> None:
    """Show one row as a table with one line per column; its first column is its name."""
    (_, name), *others = entry.items()
    table = require("rich.table", "cli").Table("", name, title=title)
    for key, text in others:
        table.add_row(key, text)
    require("rich.console", "cli").Console().print(table)
