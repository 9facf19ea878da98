"""The context of one integer run of a lowered model: its rounding, and a record of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from torchquant.errors import ExportError
from torchquant.quantizers_functional.requantize import INT32_MAX


class Follow(Protocol):
    """Receives the codes of a site and returns the codes to continue with."""

    def __call__(self, site: str, codes: Tensor, steps: Tensor) -> Tensor:
        """Return the codes to continue with. codes: int64. steps: float64, the values before rounding."""


@dataclass
class IntegerRun:
    """The settings and the record of one run. `checking`: check accumulators. `recorded`: site -> codes of each call.

    `tables`: whether weights that a file stores as levels are computed in integers. `floats` collects operators without
    integer form, as (operator, site before it); `largest` the largest accumulator that a site can reach; `not_run` the
    paths of QModules that did not run.
    """

    rounding: str
    checking: bool = False
    tables: bool = True
    follow: Follow | None = None
    recorded: dict[str, list[Tensor]] | None = None
    site: str = "the input"
    floats: dict[tuple[str, str], None] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    not_run: tuple[str, ...] = ()

    def note_float(self, operator: str) -> None:
        self.floats[operator, self.site] = None

    def check_accumulator(self, largest: float) -> None:
        """Raise ExportError where a sum of products can exceed 32 bits."""
        self.largest[self.site] = max(largest, self.largest.get(self.site, 0.0))
        if largest > INT32_MAX:
            raise ExportError(
                f"{self.site}: its sums of products can reach {largest:.3g}, more than 32 bits hold ({INT32_MAX}). Use "
                "fewer bits for its weight or its input, or give this site None to keep it float"
            )

    def noted(self, site: str, codes: Tensor, steps: Callable[[], Tensor]) -> Tensor:
        """Record the int64 codes of a site; return those to continue with. `steps()`: float64, before rounding."""
        self.site = site
        if self.recorded is not None:
            self.recorded.setdefault(site, []).append(codes)
        return codes if self.follow is None else self.follow(site, codes, steps())


_RUN: ContextVar[IntegerRun | None] = ContextVar("integer_run", default=None)


def active_run() -> IntegerRun | None:
    """Return the current run, if any."""
    return _RUN.get()


def current_run() -> IntegerRun:
    """Return the current run, or, for an integer tensor outside of a run, one that records nothing."""
    return _RUN.get() or IntegerRun("exact")


@contextmanager
def integer_run(run: IntegerRun) -> Iterator[IntegerRun]:
    """Run the functions of `qdq.py` on integers."""
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)
