"""The kernel on a CPU for the numbers of affine grids: `affine.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, FLOATS, POINTER, REAL, call, operation


@operation(FLOATS, *4 * [POINTER], COUNT, *3 * [REAL])
def affine(
    function: Any, range_max: Tensor, range_min: Tensor, n_steps: float, codes: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Return the steps of the grids over ranges, and their zero points if there are `codes`, the lowest and highest.

    Steps are `(max - min) / n_steps` with codes, and `absmax / n_steps` without. None for ranges of other types.
    """
    if range_min.dtype != range_max.dtype or range_min.shape != range_max.shape or not range_min.is_contiguous():
        return None
    step = torch.empty_like(range_max)
    zero_point = None if codes is None else torch.empty_like(range_max)
    pointers = range_min.data_ptr(), range_max.data_ptr(), step.data_ptr()
    zero_pointer = None if zero_point is None else zero_point.data_ptr()
    call(function, range_max, *pointers, zero_pointer, range_max.numel(), n_steps, *(codes or (0, 0)))
    return step, zero_point
