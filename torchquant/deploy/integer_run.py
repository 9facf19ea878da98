"""One pass of a deploy form in integers: how it rounds, what it meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from torchquant.deploy.values import Codes, IntegerTensor
from torchquant.errors import ExportError
from torchquant.quantizers_functional.requantize import INT32_MAX

LARGEST_STEP = 2.0**24
"""Steps from 0 beyond which real numbers are saturated before they become integers."""


class Follow(Protocol):
    """Sees the codes of a site and says which to go on with."""

    def __call__(self, site: str, codes: Tensor, steps: Tensor) -> Tensor:
        """codes: int64. steps: float64, what the codes were before rounding."""


@dataclass
class IntegerRun:
    """`checking`: look at accumulators. `recorded`: site -> codes of each call, if asked for.

    `tables`: whether weights that a file holds as levels count in integers. `floats` fills with what had no integer
    form, as (operator, site before it); `largest` with the largest accumulator a site can reach; `not_run`: paths of
    QModules that did not run.
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
        """Raises ExportError where a sum of products can leave 32 bits."""
        self.largest[self.site] = max(largest, self.largest.get(self.site, 0.0))
        if largest > INT32_MAX:
            raise ExportError(
                f"{self.site}: its sums of products can reach {largest:.3g}, more than 32 bits hold ({INT32_MAX}). Use "
                "fewer bits for its weight or its input, or give this site None to keep it float"
            )

    def quantized(self, site: str, grid: Any, x: Tensor) -> IntegerTensor:
        """x on a grid (`StoredGrid`). Plain numbers are rounded as QuantizeLinear does it."""
        self.site = site
        scale, zero_point = grid.shaped(x.dim())
        low, high = torch.full_like(zero_point, grid.qmin), torch.full_like(zero_point, grid.qmax)
        if isinstance(x, IntegerTensor):
            if self._lies_on(x, scale, zero_point):
                codes = x.value.codes()  # type: ignore[union-attr]
            else:
                codes = x.value.on_grid(scale, zero_point, self.rounding)  # type: ignore[union-attr]
            bounds = x.clamp_to or (None, None)
            if bounds[0] is not None:
                low = torch.maximum(low, torch.round(bounds[0] / scale).to(torch.int64) + zero_point)
            if bounds[1] is not None:
                high = torch.minimum(high, torch.round(bounds[1] / scale).to(torch.int64) + zero_point)
        else:
            steps = torch.round(x.to(torch.float32) / scale.to(torch.float32))
            steps = steps.clamp(-LARGEST_STEP, LARGEST_STEP)
            codes = steps.to(torch.int64) + zero_point
        codes = torch.minimum(torch.maximum(codes, low), high)

        def steps_before() -> Tensor:
            exact = x.value.exact() if isinstance(x, IntegerTensor) else x.to(torch.float64)
            return torch.minimum(torch.maximum(exact / scale + zero_point, low.double()), high.double())

        codes = self.noted(site, codes, steps_before)
        limit = max(int((grid.qmax - zero_point).max()), int((zero_point - grid.qmin).max()))
        return IntegerTensor(Codes(codes - zero_point, scale, zero_point, limit, site), x.shape)

    def noted(self, site: str, codes: Tensor, steps: Callable[[], Tensor]) -> Tensor:
        """The codes (int64) to go on with at a site. `steps()`: what they were before rounding, float64."""
        self.site = site
        if self.recorded is not None:
            self.recorded.setdefault(site, []).append(codes)
        return codes if self.follow is None else self.follow(site, codes, steps())

    def _lies_on(self, x: IntegerTensor, scale: Tensor, zero_point: Tensor) -> bool:
        value = x.value
        if not isinstance(value, Codes) or value.scale.shape != scale.shape:
            return False
        return torch.equal(value.scale, scale) and torch.equal(value.zero_point, zero_point)


_RUN: ContextVar[IntegerRun | None] = ContextVar("integer_run", default=None)


def active_run() -> IntegerRun | None:
    """The run under way, if any."""
    return _RUN.get()


def current_run() -> IntegerRun:
    """The run under way; one that keeps nothing where an integer tensor is used outside of one."""
    return _RUN.get() or IntegerRun("exact")


@contextmanager
def integer_run(run: IntegerRun) -> Iterator[IntegerRun]:
    """Run the functions of `qdq.py` on integers."""
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)
