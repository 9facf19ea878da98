"""The CPU kernels of range observers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, FLOATS, NUMBER, POINTER, WALK, Number, along, call, kept, operation, parts


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
