"""The kernel on a GPU for the numbers of affine grids: a dozen operations on small tensors in one launch."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant.kernels.cpu import FLOATS
from torchquant.kernels.gpu import launch, operation, tuned
from torchquant.kernels.gpu_math import at_least, between, block, divide, whole


@tuned
@triton.jit(do_not_specialize=["size"])
def _affine(
    range_min, range_max, step, zero_point, n, size,
    N_STEPS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, LIMIT: tl.constexpr, LARGEST: tl.constexpr,
    SHIFTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _, place, exists, _ = block(n, 1, 1, WIDE, ROWS)
    low = between(tl.load(range_min + place, mask=exists, other=0.0), -LIMIT, 0.0)
    high = between(tl.load(range_max + place, mask=exists, other=0.0), 0.0, LIMIT)
    span = high - low if SHIFTS else at_least(high, -low)
    unit = between(divide(span, tl.full(span.shape, N_STEPS, span.dtype)), 2.0**-126, LARGEST)
    unit = tl.where(span > 0.0, unit, 1.0)
    tl.store(step + place, unit, mask=exists)
    if SHIFTS:
        tl.store(zero_point + place, between(LEAST + whole(divide(-low, unit)), LEAST, MOST), mask=exists)


@operation(FLOATS)
def affine(
    range_max: Tensor, range_min: Tensor, n_steps: float, codes: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Return the steps of the grids over ranges, and their zero points if there are `codes`, the lowest and highest.

    Steps are `(max - min) / n_steps` with codes, and `absmax / n_steps` without. None for ranges of other types.
    """
    if range_min.dtype != range_max.dtype or range_min.shape != range_max.shape or not range_min.is_contiguous():
        return None
    step = torch.empty_like(range_max)
    zero_point = None if codes is None else torch.empty_like(range_max)
    largest = torch.finfo(torch.bfloat16 if step.dtype == torch.float32 else step.dtype).max
    least, most = (float(code) for code in codes or (0, 0))
    numbers = {"N_STEPS": float(n_steps), "LEAST": least, "MOST": most, "LARGEST": largest}
    numbers["LIMIT"] = torch.finfo(step.dtype).max / 2
    places = range_min, range_max, step, step if zero_point is None else zero_point
    launch(_affine, step, *places, step.numel(), SHIFTS=codes is not None, **numbers)
    return step, zero_point
