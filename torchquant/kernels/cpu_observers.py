"""The CPU kernels of range observers: `observers.cpp` and `histogram.cpp`."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels._bounds import Clamp
from torchquant.kernels.cpu import (
    ALL_ONES,
    COUNT,
    FLAG,
    FLOATS,
    NONE,
    POINTER,
    REAL,
    WALK,
    along,
    call,
    operation,
    threads_for,
)

ADDED, MOVED = 0, 1
"""How the library says what it did with a batch."""
NO_MEMORY, NOT_FINITE = 1, 3
"""How it says why it did nothing."""


@operation(FLOATS, POINTER, *2 * [COUNT], *3 * [POINTER], COUNT, *2 * [FLAG])
def histogram(
    function: Any,
    x: Tensor,
    low: Tensor,
    scale: Tensor,
    n_bins: int,
    with_zeros: bool = True,
    of_magnitude: bool = False,
) -> Tensor:
    """Count the elements of each row in each bin `clamp((x - low) * scale, 0, n_bins - 1)`, (C, n_bins) float64.

    x: (C, n). low, scale: (C, 1). Elements that are 0 count only `with_zeros`; `of_magnitude`: |x| is counted.
    """
    counts = torch.zeros(len(x), n_bins, dtype=torch.float64)
    pointers = low.data_ptr(), scale.data_ptr(), counts.data_ptr()
    call(function, x, x.data_ptr(), *x.shape, *pointers, n_bins, with_zeros, of_magnitude)
    return counts


@operation(FLOATS, POINTER, *2 * [COUNT], *2 * [POINTER], COUNT, *2 * [POINTER], *2 * [FLAG])
def batch(
    function: Any, x: Tensor, counts: Tensor, seen: list[float], with_zeros: bool, of_magnitude: bool
) -> tuple[tuple[list[float], list[float]], Tensor] | bool:
    """Add a batch to the counts of all data seen, as `histogram` counts, in bins between the ends of the data.

    x: (C, n). counts: (C, n_bins) float64. seen: the lower ends of all rows, then the upper ones, inf and -inf for
    rows without data. Returns True if the batch was within these ends and was added. Else the counts do not change:
    returns the ends of all data, and the counts of all data between these; False if a row has NaN or is infinite.
    """
    moved, n_rows = torch.empty_like(counts), len(counts)
    ends, outcome = (ctypes.c_double * len(seen))(*seen), ctypes.c_int()
    places = ctypes.addressof(ends), ctypes.addressof(outcome)
    pointers = counts.data_ptr(), moved.data_ptr()
    call(function, x, x.data_ptr(), *x.shape, *pointers, counts.shape[1], *places, with_zeros, of_magnitude)
    if outcome.value == MOVED:
        return (ends[:n_rows], ends[n_rows:]), moved
    return outcome.value == ADDED


@operation((torch.float64,), *2 * [POINTER], *2 * [COUNT], *4 * [POINTER])
def rebinned(function: Any, counts: Tensor, *ends: Tensor) -> Tensor | None:
    """Move the mass of rows (C, n_bins) from bins between two ends to bins between two others; ends: (C,) each."""
    if any(end.dtype != counts.dtype or not end.is_contiguous() for end in ends):
        return None
    found = torch.empty_like(counts)
    pointers = (end.data_ptr() for end in ends)
    call(function, counts, counts.data_ptr(), found.data_ptr(), *counts.shape, *pointers)
    return found


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
    held = range_min, range_max, weight
    if not _are_of_type(x, held):
        return False
    least, most = clamp or (None, None)
    ends = -math.inf if least is None else least, math.inf if most is None else most
    flags = starts_at_first, joins, axis is not None
    pointers = x.data_ptr(), *(one.data_ptr() for one in held)
    failed = function(*pointers, *_slices(x, axis), *ends, momentum, *flags, *threads_for(x))
    if failed == 0:
        torch.autograd.graph.increment_version(held)
    return not failed


@operation(FLOATS, *6 * [POINTER], *WALK, REAL, *3 * [FLAG], *4 * [REAL], *2 * [REAL], *2 * [FLAG])
def observed(
    function: Any,
    x: Tensor,
    held: tuple[Tensor, Tensor, Tensor],
    axis: int | None,
    average: tuple[float, bool, bool],
    grid: tuple[float, int, int, float | None],
    clamp: Clamp | None,
    is_strict: bool,
    wants_inside: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Do what `track` does, then quantize x on the affine grid over the range, as `affine` and `uniform` do.

    held: the ends of the range and its weight. average: momentum, `starts_at_first` and `joins` of `track`. grid:
    number of steps in the range, lowest and highest code, and the zero point, None if it follows from the range.
    Returns value and mask of `uniform`; None, and changes nothing, where `track` returns False.
    """
    if not _are_of_type(x, held):
        return None
    shape, (*rule, zero_point), (least, most) = _slices(x, axis), grid, clamp or (None, None)
    value, bits, bits_pointer = torch.empty_like(x), None, None
    if wants_inside or is_strict:
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        bits_pointer = bits.data_ptr()
    low, high, weight = held
    found = function(
        *(x.data_ptr(), value.data_ptr(), bits_pointer, low.data_ptr(), high.data_ptr(), weight.data_ptr(), *shape),
        *(*average, axis is not None, *rule, NONE if zero_point is None else zero_point),
        *(NONE if least is None else least, NONE if most is None else most, is_strict, wants_inside, *threads_for(x)),
    )
    if found in (NO_MEMORY, NOT_FINITE):
        return None
    torch.autograd.graph.increment_version(held)
    return value, None if found == ALL_ONES else bits


def _are_of_type(x: Tensor, held: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether the numbers of a range lie in memory in the type of x, as a kernel takes them."""
    low, high, weight = held
    return (
        low.dtype is high.dtype is weight.dtype is x.dtype
        and (low.is_cpu and high.is_cpu and weight.is_cpu)
        and (low.is_contiguous() and high.is_contiguous() and weight.is_contiguous())
    )


def _slices(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    return (1, 1, x.numel()) if axis is None or x.ndim == 0 else along(x, axis % x.ndim)
