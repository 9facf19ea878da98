"""The kernels on a CPU of sums over rows: `row_sums.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, POINTER, call, operation

SINGLE = (torch.float32,)
SUMMED = 256
"""Elements that are added as float32; what is left of a row is added as float64."""
LEAST, MOST = 2.0**-20, 2.0**58
"""Largest magnitudes of rows whose squares neither overflow nor lose what counts in float64."""


def _empty(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(len(rows), rows.shape[1] // SUMMED), rows.new_empty(len(rows), dtype=torch.float64)


def _joined(of_blocks: Tensor, rests: Tensor) -> Tensor:
    return of_blocks.to(torch.float64).sum(1) + rests if of_blocks.numel() else rests


def _sums(function: Any, rows: Tensor) -> Tensor | None:
    of_blocks, rests = _empty(rows)
    ends = torch.empty(2, dtype=torch.float64)
    pointers = (t.data_ptr() for t in (rows, of_blocks, rests, ends))
    call(function, rows, *pointers, *rows.shape)
    least, most = ends.tolist()
    return _joined(of_blocks, rests) if least >= LEAST and most <= MOST else None


@operation(SINGLE, *4 * [POINTER], *2 * [COUNT])
def magnitude_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of |x| over each row, (C,) float64; None if a row has only numbers that are too small or too large.

    rows: (C, n).
    """
    return _sums(function, rows)


@operation(SINGLE, *4 * [POINTER], *2 * [COUNT])
def square_sums(function: Any, rows: Tensor) -> Tensor | None:
    """Return the sum of x * x over each row as `magnitude_sums` does that of |x|."""
    return _sums(function, rows)


@operation(SINGLE, *6 * [POINTER], *2 * [COUNT])
def sums_above(function: Any, rows: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum, and the number, of the |x| of each row that are above its threshold; two (C,) float64.

    rows: (C, n). thresholds: (C,) in the type of rows.
    """
    sums, counts = _empty(rows), _empty(rows)
    thresholds = thresholds.contiguous()
    pointers = (t.data_ptr() for t in (rows, thresholds, *sums, *counts))
    call(function, rows, *pointers, *rows.shape)
    return _joined(*sums), _joined(*counts)
