"""Show the progress of a run: a progress bar on a terminal, plain lines elsewhere; with the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torchquant.errors import require
from torchquant.runs.clock import Clock, duration
from torchquant.training.batches import make_bar
from torchquant.training.growing_table import GrowingTable, make_table

PULSE = 10.0
"""Seconds after which a line says that the run goes on, where there is no terminal."""


class NullProgress:
    """Shows nothing. It is also the interface of a context manager that shows the progress of a run."""

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

    def within(self, amount: float, doing: str) -> None:
        """Show that `amount` of the units after the finished ones are done by now; they are not added."""

    def skip(self, amount: float) -> None:
        """Add units that an earlier run finished, which say nothing about the time that units take."""

    def row(self, title: str, cells: Mapping[str, str]) -> None:
        """Add a row, column -> text, to the table `title`, which grows during the run."""

    def table(self, title: str, header: list[str], rows: list[list[str]], note: str) -> None:
        """Show the result."""


class Terminal(NullProgress):
    """Shows progress with rich: a bar with a live message below growing tables and lines.

    Off a terminal there are lines only: one where something is finished, and one every ten seconds otherwise.
    `console`: a rich Console, by default one on standard output. Raises MissingDependencyError.
    """

    def __init__(self, console: Any = None) -> None:
        self._console = console or require("rich.console", "cli").Console()
        self._tables: dict[str, GrowingTable] = {}
        self._bar = make_bar(self._console, lambda: (table.render() for table in self._tables.values()))
        self._task: Any = None
        self._clock, self._doing, self._printed = Clock(0.0), "checking everything", time.monotonic()
        self._ended = threading.Event()
        self._depth = 0  # a run can show the runs that are a part of it

    def __enter__(self) -> Terminal:
        self._depth += 1
        self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(self._doing, total=None)
        if self._depth == 1 and not self._console.is_terminal:
            self._ended.clear()
            threading.Thread(target=self._pulse, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._ended.set()
            self._bar.stop()

    def start(self, total: float) -> None:
        self._clock = Clock(total)
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("starting", total=total)

    def message(self, text: str) -> None:
        self._printed = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, amount: float, doing: str) -> None:
        self._clock.advance(amount)
        self._update(doing)

    def within(self, amount: float, doing: str) -> None:
        self._clock.within(amount)
        self._update(doing)

    def skip(self, amount: float) -> None:
        self._clock.skip(amount)

    def _update(self, doing: str) -> None:
        self._doing = doing
        left = self._clock.left()
        words = doing if left is None else f"{doing}, {duration(left)} left"
        self._bar.update(self._task, completed=self._clock.position, description=words)

    def _pulse(self) -> None:
        """Print a line whenever none was printed for a while."""
        while not self._ended.wait(max(PULSE - (time.monotonic() - self._printed), 0.05)):
            if time.monotonic() - self._printed >= PULSE:
                self.message(f"{self._doing}; {self._clock.words()}")

    def row(self, title: str, cells: Mapping[str, str]) -> None:
        table = self._tables.setdefault(title, GrowingTable(title))
        table.add(cells)
        if not self._console.is_terminal:
            self.message(table.line(cells))

    def table(self, title: str, header: list[str], rows: list[list[str]], note: str) -> None:
        self._console.print(make_table(title, header, rows, note))
