"""The kernels on a GPU of uniform grids, their codes, and masks."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant._tensors import like
from torchquant.kernels._bounds import Bound, Clamp, code_bounds
from torchquant.kernels.cpu import FLOATS, HALVES, Number, parts
from torchquant.kernels.gpu import FLAGS, launch, operation, read, tuned
from torchquant.kernels.gpu_math import block, clamp, divide, number, store_bits, times_bits, whole


@tuned
@triton.jit(do_not_specialize=["size"])
def _uniform(
    x, value, bits, step, low, high, below, above, n, inner, channels, size,
    STEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    INSIDE: tl.constexpr, PACKS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    unit = number(step, real, channel, STEP)
    rounded = whole(divide(real, unit))
    code = clamp(rounded, number(low, real, channel, LOW), number(high, real, channel, HIGH))
    tl.store(value + place, code * unit, mask=exists)
    if PACKS:
        inside = exists
        if INSIDE:
            inside = inside & (rounded == code)
        if BELOW != -2:
            inside = inside & ((real <= number(below, real, channel, BELOW)) == 0)
        if ABOVE != -2:
            inside = inside & ((real >= number(above, real, channel, ABOVE)) == 0)
        store_bits(bits, rows, inside, n)


@tuned
@triton.jit(do_not_specialize=["size"])
def _masked(grad, bits, out, n, size, WIDE: tl.constexpr, ROWS: tl.constexpr):
    rows, place, exists, _ = block(n, 1, 1, WIDE, ROWS)
    given = tl.load(grad + place, mask=exists, other=0.0)
    tl.store(out + place, times_bits(given, bits, rows, n), mask=exists)


@tuned
@triton.jit(do_not_specialize=["size"])
def _to_codes(
    value, codes, step, low, n, inner, channels, size,
    STEP: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    level = tl.load(value + place, mask=exists, other=0.0)
    lifted = divide(level, number(step, level, channel, STEP)) + (0.5 - number(low, level, channel, LOW))
    tl.store(codes + place, tl.where(lifted == lifted, lifted, 0.0).to(tl.int32).to(tl.uint8), mask=exists)


@tuned
@triton.jit(do_not_specialize=["size"])
def _from_codes(
    codes, value, step, low, n, inner, channels, size,
    STEP: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    code = tl.load(codes + place, mask=exists, other=0).to(value.dtype.element_ty)
    tl.store(value + place, (code + number(low, code, channel, LOW)) * number(step, code, channel, STEP), mask=exists)


def _centred(
    x: Tensor, step: Number, low: Number, high: Number, zero_point: Number, clamp: Clamp | None
) -> list[Number]:
    """Return the bounds of codes counted from real 0, in x's type."""
    bounds = code_bounds(x, cast(Tensor, step), cast(Bound, low), cast(Bound, high), cast(Bound, zero_point), clamp)
    return [like(bound, x) if isinstance(bound, Tensor) else bound for bound in bounds]


@operation(FLOATS)
def uniform(
    x: Tensor,
    step: Number,
    low: Number,
    high: Number,
    zero_point: Number = 0,
    clamp: Clamp | None = None,
    is_strict: bool = False,
    wants_inside: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """Return `clamp(round(x / step), *code_bounds) * step` and a mask, packed; None for numbers of other shapes.

    step, low, high, zero_point: in x's type, broadcastable along one axis at most; see `code_bounds`. The mask is 1
    where the rounded code was not clamped, if `wants_inside`, and strictly between the ends of the clamp, if
    `is_strict`; None if nothing is asked.
    """
    low, high = _centred(x, step, low, high, zero_point, clamp)
    shape = parts(x, step, low, high)
    if shape is None:
        return None
    below, above = clamp if clamp is not None and is_strict else (None, None)
    numbers, kinds = read(x, step=step, low=low, high=high, below=below, above=above)
    value, packs = torch.empty_like(x), wants_inside or is_strict
    bits = x.new_empty(-(-x.numel() // FLAGS), dtype=torch.uint8) if packs else None
    places = x, value, value if bits is None else bits
    launch(_uniform, x, *places, *numbers, x.numel(), shape[2], shape[1], INSIDE=wants_inside, PACKS=packs, **kinds)
    return value, bits


@operation(FLOATS)
def to_codes(value: Tensor, step: Number, low: Number, zero_point: Number = 0) -> tuple[Tensor, Tensor] | None:
    """Return the codes of values on the grid, counted from `low`, as uint8, and 0, or NaN if a value is NaN."""
    low = low - zero_point
    shape = parts(value, step, low)
    if shape is None:
        return None
    numbers, kinds = read(value, step=step, low=low)
    codes = torch.empty_like(value, dtype=torch.uint8)
    launch(_to_codes, value, value, codes, *numbers, value.numel(), shape[2], shape[1], **kinds)
    return codes, value.amax() * 0.0


@operation(FLOATS)
def from_codes(codes: Tensor, step: Number, low: Number, dtype: torch.dtype, zero_point: Number = 0) -> Tensor | None:
    """Return `(codes + low - zero_point) * step` in `dtype`. codes: (*) uint8."""
    low = low - zero_point
    shape = parts(codes, step, low)
    if shape is None:
        return None
    value = torch.empty_like(codes, dtype=dtype)
    numbers, kinds = read(value, step=step, low=low)
    launch(_from_codes, codes, codes, value, *numbers, codes.numel(), shape[2], shape[1], **kinds)
    return value


@operation(FLOATS + HALVES)
def masked(grad: Tensor, bits: Tensor) -> Tensor:
    """Return grad times 1 or 0, from `bits` that were packed in the memory order of grad."""
    out = torch.empty_like(grad)
    launch(_masked, grad, grad, bits, out, grad.numel())
    return out
