"""The kernels on a CPU of formats that are a few fixed numbers times a scale: `projections.cpp`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, FLAG, NONE, POINTER, REAL, call, operation, rows_of_numbers

SINGLE = (torch.float32,)
Clamp = tuple[float | None, float | None]
Found = tuple[Tensor, Tensor | None] | None
ASKED = (*3 * [POINTER], *3 * [COUNT], *3 * [POINTER], *4 * [REAL], FLAG)


def _project(
    function: Any,
    x: Tensor,
    numbers: tuple[Tensor, ...],
    clamp: Clamp | None,
    is_strict: bool,
    wants_inside: bool,
    *constants: float,
) -> Found:
    """Return the projection of x, or of `x.clamp(*clamp)`, and a mask, packed; None for numbers of other shapes.

    numbers: one to three, in x's type, broadcastable along one axis at most. The mask is 1 where x was not clipped, if
    `wants_inside`, and strictly inside the clamp, if `is_strict`; None if nothing is asked.
    """
    found = rows_of_numbers(x, *numbers, *(3 - len(numbers)) * numbers[:1])
    if found is None:
        return None
    shape, rows = found
    low, high = (None, None) if clamp is None else clamp
    below, above = (NONE if end is None or not is_strict else end for end in (low, high))
    value, bits = torch.empty_like(x), None
    if wants_inside or (is_strict and clamp is not None):
        bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    pointers = x.data_ptr(), value.data_ptr(), None if bits is None else bits.data_ptr()
    ends = -math.inf if low is None else low, math.inf if high is None else high, below, above
    rows_at = (row.data_ptr() for row in rows if row is not None)
    call(function, x, *pointers, *shape, *rows_at, *ends, wants_inside, *constants)
    return value, bits


@operation(SINGLE, *ASKED)
def signs(*arguments: Any) -> Found:
    """Project on the scale times 1 where x >= 0, else -1; arguments as in `_project`."""
    return _project(*arguments)


@operation(SINGLE, *ASKED)
def ternary(*arguments: Any) -> Found:
    """Project on `scale * sign(x)` where |x| is above the second number, else 0; arguments as in `_project`."""
    return _project(*arguments)


@operation(SINGLE, *ASKED, REAL)
def powers_of_two(*arguments: Any) -> Found:
    """Project on the scale times `+-2**i`, from 1 to a largest power; arguments as in `_project`, then that power."""
    return _project(*arguments)


@operation(SINGLE, *ASKED, *4 * [REAL])
def floats(*arguments: Any) -> Found:
    """Project on mini-floats times the scale, saturating; arguments as in `_project`, then the format.

    The format: the smallest normal number, the largest power of two, the spacing at 1, the largest number.
    """
    return _project(*arguments)


@operation(SINGLE, *ASKED, *4 * [REAL])
def shifted_floats(*arguments: Any) -> Found:
    """Project as `floats` does on levels that are shifted by the second number."""
    return _project(*arguments)


@operation(SINGLE, *ASKED, REAL, REAL)
def midrise(*arguments: Any) -> Found:
    """Project on the scale times `code + 0.5`, x in cells of the second number; arguments as in `_project`, then codes.

    The codes are the smallest and the largest.
    """
    return _project(*arguments)


@operation(SINGLE, *ASKED, REAL, REAL)
def shifted_midrise(*arguments: Any) -> Found:
    """Project as `midrise` does on levels and cells that are shifted by the third number."""
    return _project(*arguments)
