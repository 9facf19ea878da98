"""The kernels on a CPU of sums over rows: `row_sums.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, POINTER, call, operation

SINGLE = (torch.float32,)
LEAST, MOST = 2.0**-20, 2.0**58
"""Largest magnitudes of rows whose squares neither overflow nor lose what counts in float64."""


def _sums(function: Any, rows: Tensor) -> Tensor | None:
    n_rows, n = rows.shape
    found = rows.new_empty(n_rows + 2, dtype=torch.float64)
    totals, ends = found[:n_rows], found[n_rows:]
    call(function, rows, rows.data_ptr(), totals.data_ptr(), ends.data_ptr(), n_rows, n)
    least, most = ends.tolist()
    return totals if least >= LEAST and most <= MOST else None


@operation(SINGLE, *3 * [POINTER], *2 * [COUNT])
def magnitude_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of |x| over each row, (C,) float64; None if the numbers of a row are too small or too large.

    rows: (C, n).
    """
    return _sums(function, rows)


@operation(SINGLE, *3 * [POINTER], *2 * [COUNT])
def square_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of x * x over each row as `magnitude_sums` does that of |x|."""
    return _sums(function, rows)


@operation(SINGLE, *4 * [POINTER], *2 * [COUNT])
def sums_above(function: Any, rows: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum, and the number, of the |x| of each row that are above its threshold; two (C,) float64.

    rows: (C, n). thresholds: (C,) float64, rounded to the type of rows.
    """
    n_rows, n = rows.shape
    thresholds = thresholds.contiguous()
    totals, counts = rows.new_empty((2, n_rows), dtype=torch.float64)
    pointers = (t.data_ptr() for t in (rows, thresholds, totals, counts))
    call(function, rows, *pointers, n_rows, n)
    return totals, counts
