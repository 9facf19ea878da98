"""The kernels on a CPU of sums over rows: `row_sums.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, POINTER, REAL, call, operation

SINGLE = (torch.float32,)
ROWS = (*3 * [POINTER], *2 * [COUNT])
LEAST, MOST = 2.0**-20, 2.0**58
"""Largest magnitudes of rows whose squares neither overflow nor lose what counts in float64."""
MOST_SCALES = 7
"""The largest number of scales that `left_sums` takes."""


def _sums(function: Any, rows: Tensor, n_sums: int, *arguments: Any) -> Tensor | None:
    """Return the sums over each row, (n_sums, C) float64; None if the numbers of a row are too small or too large."""
    n_rows, n = rows.shape
    found = rows.new_empty(n_sums * n_rows + 2, dtype=torch.float64)
    totals, ends = found[:-2].view(n_sums, n_rows), found[-2:]
    call(function, rows, rows.data_ptr(), totals.data_ptr(), ends.data_ptr(), n_rows, n, *arguments)
    least, most = ends.tolist()
    return totals if least >= LEAST and most <= MOST else None


def _sums_of_any(function: Any, rows: Tensor, n_sums: int, *numbers: Tensor) -> Tensor:
    """Return the sums over each row, (n_sums, C) float64, of numbers of any size."""
    totals, numbers = rows.new_empty((n_sums, len(rows)), dtype=torch.float64), tuple(n.contiguous() for n in numbers)
    pointers = (n.data_ptr() for n in numbers)
    call(function, rows, rows.data_ptr(), totals.data_ptr(), None, *rows.shape, *pointers)
    return totals


@operation(SINGLE, *ROWS)
def plain_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of each row, (1, C) float64; None if the numbers of a row are too small or too large.

    rows: (C, n).
    """
    return _sums(function, rows, 1)


@operation(SINGLE, *ROWS)
def magnitude_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of |x| over each row as `plain_sums` does that of x."""
    return _sums(function, rows, 1)


@operation(SINGLE, *ROWS)
def square_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of x * x over each row as `plain_sums` does that of x."""
    return _sums(function, rows, 1)


@operation(SINGLE, *ROWS, POINTER)
def centred_square_sums(function: Any, rows: Tensor, centres: Tensor) -> Tensor | None:
    """Return the sum of the float64 `(x - centre)**2` over each row as `plain_sums` does that of x.

    centres: (C,) float64.
    """
    centres = centres.contiguous()
    return _sums(function, rows, 1, centres.data_ptr())


@operation(SINGLE, *ROWS, POINTER, REAL, REAL)
def cell_sums(function: Any, rows: Tensor, widths: Tensor, low: int, high: int) -> Tensor | None:
    """Return the sums of x times p, and of p * p, over each row, (2, C) float64; None as `plain_sums` does.

    `p = clamp(floor(x / width), low, high) + 0.5`. widths: (C,) float32; 0 counts as 1.
    """
    widths = widths.contiguous()
    return _sums(function, rows, 2, widths.data_ptr(), low, high)


@operation(SINGLE, *ROWS, POINTER, COUNT)
def left_sums(function: Any, rows: Tensor, scales: Tensor) -> Tensor | None:
    """Return the sum over each row of what the signs times scales leave of |x|; (1, C) float64, None as `plain_sums`.

    Each sign is that of what the scales before it leave of x. scales: (C, k) float32; k at most `MOST_SCALES`.
    """
    if scales.shape[1] > MOST_SCALES:
        return None
    scales = scales.contiguous()
    return _sums(function, rows, 1, scales.data_ptr(), scales.shape[1])


@operation(SINGLE, *ROWS, POINTER)
def sums_above(function: Any, rows: Tensor, thresholds: Tensor) -> Tensor:
    """Return the sum, and the number, of the |x| of each row that are above its threshold; (2, C) float64.

    rows: (C, n). thresholds: (C,) float64, rounded to the type of rows.
    """
    return _sums_of_any(function, rows, 2, thresholds)


@operation(SINGLE, *ROWS)
def wide_sums(function: Any, rows: Tensor) -> Tensor:
    """Return the sum of each row, and the number of its elements other than 0, (2, C) float64, added in float64."""
    return _sums_of_any(function, rows, 2)


@operation(SINGLE, *ROWS, POINTER)
def distance_sums(function: Any, rows: Tensor, centres: Tensor) -> Tensor:
    """Return the sums of `(x - centre)**2` and of `|x - centre|` over each row, and how many x are above 0; (3, C).

    centres: (C,) float64, in which differences are taken and added.
    """
    return _sums_of_any(function, rows, 3, centres)


@operation(SINGLE, *ROWS, *2 * [POINTER])
def cut_sums(function: Any, rows: Tensor, lows: Tensor, highs: Tensor) -> Tensor | None:
    """Return the sum of `(x - x.clamp(low, high))**2` over each row for each of three ranges, (3, C) float64.

    lows, highs: (3, C) float64. None for another number of ranges.
    """
    return _sums_of_any(function, rows, 3, lows, highs) if len(lows) == 3 else None
