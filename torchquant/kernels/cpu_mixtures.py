"""The kernels on a CPU of weighted sums of projections: `mixtures.cpp`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_double, c_int64
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, NONE, POINTER, REAL, along, call, operation

SINGLE = (torch.float32,)
KINDS = {
    name: kind
    for kind, name in enumerate(
        ("ternary", "powers_of_two", "floats", "shifted_floats", "midrise", "shifted_midrise", "uniform", "levels")
    )
}
"""Name of a kernel -> the number of its form in `mixtures.cpp`."""
N_CONSTANTS = 4
MIXED = (*4 * [COUNT], *4 * [POINTER], *4 * [REAL])


@dataclass(frozen=True)
class Members:
    """The projections of a mixture.

    `kernels`: the name, and the constants, of each. `rows`: how many numbers of channels each has. `clips`: whether its
    gradient is 0 where x is clipped. `numbers`: those of all projections, one after the other, (R, C) float32. `axis`:
    that of the channels, None for one number for all of x. `clamp`: what x is clamped to first.
    """

    kernels: Sequence[tuple[str, Sequence[float]]]
    rows: Sequence[int]
    clips: Sequence[bool]
    numbers: Tensor
    axis: int | None
    clamp: tuple[float | None, float | None] | None

    @cached_property
    def _tables(self) -> tuple[Any, Any]:
        """The kinds and the constants of all projections, as C takes them."""
        own = [(KINDS[name], n, c) for (name, _), n, c in zip(self.kernels, self.rows, self.clips, strict=True)]
        padded = [number for _, given in self.kernels for number in (*given, *(N_CONSTANTS - len(given)) * [0.0])]
        return (c_int64 * (3 * len(own)))(*(n for of_one in own for n in of_one)), (c_double * len(padded))(*padded)

    def arguments(self, x: Tensor, shares: Tensor) -> tuple[Any, ...]:
        """Return the arguments of C for all but x itself; shares must live on."""
        shape = (1, 1, x.numel()) if self.axis is None else along(x, self.axis % x.ndim)
        kinds, constants = self._tables
        low, high = self.clamp or (None, None)
        ends = -math.inf if low is None else low, math.inf if high is None else high
        strictly = (NONE if end is None else end for end in (low, high))
        numbers = self.numbers.data_ptr(), shares.data_ptr()
        return *shape, len(self.kernels), kinds, constants, *numbers, *ends, *strictly


@operation(SINGLE, *2 * [POINTER], *MIXED)
def mixture(function: Any, x: Tensor, shares: Tensor, members: Members) -> Tensor:
    """Return the sum of the projections of x times shares, (K,) float32, added in order."""
    shares, y = shares.contiguous(), torch.empty_like(x)
    call(function, x, x.data_ptr(), y.data_ptr(), *members.arguments(x, shares))
    return y


@operation(SINGLE, *4 * [POINTER], *MIXED)
def mixture_backward(
    function: Any, x: Tensor, grad: Tensor, shares: Tensor, members: Members, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of the shares of `mixture`, those that are `wanted`; the latter in float64."""
    shares = shares.contiguous()
    for_x = torch.empty_like(x) if wanted[0] else None
    sums = x.new_empty(len(shares), dtype=torch.float64) if wanted[1] else None
    pointers = (None if t is None else t.data_ptr() for t in (x, grad, for_x, sums))
    call(function, x, *pointers, *members.arguments(x, shares))
    return for_x, sums
