"""The CPU kernels of range observers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels._bounds import Clamp
from torchquant.kernels.cpu import (
    COUNT,
    FLAG,
    FLOATS,
    NUMBER,
    POINTER,
    REAL,
    WALK,
    Number,
    along,
    call,
    kept,
    operation,
    parts,
    threads_for,
)


@operation(FLOATS, *3 * [POINTER], *WALK, *2 * NUMBER, COUNT)
def histogram(
    function: Any, x: Tensor, low: Number, scale: Number, n_bins: int, wants_zeros: bool = False
) -> tuple[Tensor, Tensor | None] | None:
    """Count the elements of each row in each bin `clamp((x - low) * scale, 0, n_bins - 1)`, and those that are 0.

    x: (C, n), without NaN. low, scale: (C, 1). Returns (C, n_bins) int64, and (C,) int64 if `wants_zeros`.
    """
    shape = parts(x, low, scale)
    if shape is None or shape[1] != len(x):
        return None
    counts = x.new_zeros((len(x), n_bins), dtype=torch.int64)
    zeros = x.new_zeros(len(x), dtype=torch.int64) if wants_zeros else None
    held, numbers = kept(low, scale)
    pointers = x.data_ptr(), counts.data_ptr(), None if zeros is None else zeros.data_ptr()
    call(function, x, *pointers, *shape, *numbers, n_bins)
    return counts, zeros


@operation(FLOATS, *3 * [POINTER], *WALK)
def min_max(function: Any, x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element, () each, or of each slice of an axis, (C,); NaN if there is one."""
    shape = (1, 1, x.numel()) if axis is None else along(x, axis % x.ndim)
    size = () if axis is None else (shape[1],)
    low, high = x.new_empty(size), x.new_empty(size)
    call(function, x, x.data_ptr(), low.data_ptr(), high.data_ptr(), *shape)
    return low, high


@operation(FLOATS, *4 * [POINTER], *WALK, *3 * [REAL], *3 * [FLAG])
def track(
    function: Any,
    x: Tensor,
    range_min: Tensor,
    range_max: Tensor,
    weight: Tensor,
    axis: int | None,
    clamp: Clamp | None,
    momentum: float,
    starts_at_first: bool = False,
    joins: bool = False,
) -> bool:
    """Average the ends of `x.clamp(*clamp)` into a range, in place, and count it in `weight`.

    Returns False, and changes nothing, where an end is not finite, or where the range is not of x's type.
    `starts_at_first`: the first tensor counts alone. `joins`: the range never shrinks.
    """
    for held in (range_min, range_max, weight):
        if held.dtype != x.dtype or not held.is_cpu or not held.is_contiguous():
            return False
    shape = (1, 1, x.numel()) if axis is None or x.ndim == 0 else along(x, axis % x.ndim)
    least, most = clamp or (None, None)
    pointers = x.data_ptr(), range_min.data_ptr(), range_max.data_ptr(), weight.data_ptr()
    ends = -math.inf if least is None else least, math.inf if most is None else most
    flags = starts_at_first, joins, axis is not None
    failed = function(*pointers, *shape, *ends, momentum, *flags, *threads_for(x))
    if failed == 0:
        torch.autograd.graph.increment_version((range_min, range_max, weight))
    return not failed
