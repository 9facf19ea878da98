"""Show the progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torchquant.errors import require
from torchquant.training.batches import make_bar
from torchquant.training.growing_table import GrowingTable, make_table


class NullProgress:
    """Shows nothing. It is also the interface: a context manager with `start`, `message`, `advance`, `row`, `table`."""

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the progress bar, if there is one."""

    def start(self, total: float) -> None:
        """Start the progress at 0 of `total` units of work."""

    def message(self, text: str) -> None:
        """Show a text that stays, about finished work."""

    def advance(self, amount: float, doing: str) -> None:
        """Add `amount` finished units; `doing` describes the current work and need not stay."""

    def row(self, title: str, cells: Mapping[str, str]) -> None:
        """Add a row, column -> text, to the table `title`, which grows during the run."""

    def table(self, title: str, header: list[str], rows: list[list[str]], note: str) -> None:
        """Show the result."""


class Terminal(NullProgress):
    """Shows progress with rich: a bar with a live message below growing tables and lines. Off a terminal: lines only.

    `console`: a rich Console, by default one on standard output. Raises MissingDependencyError.
    """

    def __init__(self, console: Any = None) -> None:
        self._console = console or require("rich.console", "cli").Console()
        self._tables: dict[str, GrowingTable] = {}
        self._bar = make_bar(self._console, lambda: (table.render() for table in self._tables.values()))
        self._task: Any = None

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, total: float) -> None:
        self._task = self._bar.add_task("starting", total=total)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, amount: float, doing: str) -> None:
        self._bar.update(self._task, advance=amount, description=doing)

    def row(self, title: str, cells: Mapping[str, str]) -> None:
        table = self._tables.setdefault(title, GrowingTable(title))
        table.add(cells)
        if not self._console.is_terminal:
            self.message(table.line(cells))

    def table(self, title: str, header: list[str], rows: list[list[str]], note: str) -> None:
        self._console.print(make_table(title, header, rows, note))
