"""Tables of rich, and one that grows while something runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchquant.errors import require

MOST_ROWS = 12
"""How many of the last rows of a growing table are shown."""


class GrowingTable:
    """A table with a title to which rows, column -> text, are added."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._rows: list[Mapping[str, str]] = []

    def add(self, cells: Mapping[str, str]) -> None:
        """Add a row."""
        self._rows.append(cells)

    def line(self, cells: Mapping[str, str]) -> str:
        """Return a row as a line, for places where nothing can be drawn again."""
        return f"{self.title}: " + ", ".join(f"{name} {text}" for name, text in cells.items())

    def render(self) -> Any:
        """Return the last rows as a table of rich; a row without a column has "-" there."""
        last = self._rows[-MOST_ROWS:]
        header = list(dict.fromkeys(name for row in last for name in row))
        return make_table(self.title, header, [[row.get(name, "-") for name in header] for row in last], "")


def make_table(title: str, header: list[str], rows: list[list[str]], note: str) -> Any:
    """Return a table of rich. Raises MissingDependencyError."""
    table = require("rich.table", "cli").Table(title=title, caption=note)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
