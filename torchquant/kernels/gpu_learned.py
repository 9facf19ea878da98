"""The kernels on a GPU of grids whose step, offset or upper end is learned.

The gradient of such a number is a sum. Where each 8 elements that are next to each other in memory are of one channel,
a kernel adds them by pairs of neighbours; PyTorch adds these sums, or the elements, in float64. That order is the same
for every block.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant.kernels.cpu import FLOATS, parts
from torchquant.kernels.gpu import FLAGS, launch, operation, read, tuned
from torchquant.kernels.gpu_math import block, clamp, divide, number, store_bits, sum_of_row, times_bits, whole

Gradients = tuple[Tensor | None, ...]
Shape = tuple[int, int, int]


@tuned
@triton.jit(do_not_specialize=["size"])
def _learned_step(
    x, value, step, offset, low, high, n, inner, channels, size,
    STEP: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    unit = number(step, real, channel, STEP)
    if OFFSET != -2:
        real = real - number(offset, real, channel, OFFSET)
    code = clamp(divide(real, unit), number(low, real, channel, LOW), number(high, real, channel, HIGH))
    level = whole(code) * unit
    if OFFSET != -2:
        level = level + number(offset, real, channel, OFFSET)
    tl.store(value + place, level, mask=exists)


@triton.jit
def _clamped_first(x, grad, step, low, high, delta, unit, LEANS: tl.constexpr):
    """Return the gradient of x and the part of that of the step, as LSQ has them; with delta x's is that of EWGS."""
    scaled = divide(x, step)
    kept = clamp(scaled, low, high)
    code = whole(kept)
    passed = grad
    if LEANS:
        sign = (grad > 0.0).to(x.dtype) - (grad < 0.0).to(x.dtype)
        passed = grad * (1.0 + delta * sign * ((kept - code) * unit))
    is_clipped = (scaled <= low) | (scaled >= high)
    return tl.where(is_clipped, 0.0, passed), (code - tl.where(is_clipped, 0.0, scaled)) * grad


@triton.jit
def _rounded_first(x, grad, step, low, high, delta, unit, LEANS: tl.constexpr):
    """Return what `_clamped_first` does, as TQT has it: the rounded code decides what is clipped."""
    scaled = divide(x, step)
    rounded = whole(scaled)
    is_clipped = (rounded <= low - 0.5) | (rounded >= high + 0.5)
    code = clamp(rounded, low, high)
    return tl.where(is_clipped, 0.0, grad), (code - tl.where(is_clipped, 0.0, scaled)) * grad


@triton.jit
def _calibrated(x, grad, end, low, n_steps, delta, unit, LEANS: tl.constexpr):
    """Return the gradient of x and the part of that of the upper end, as SAT has them."""
    above, share = (x >= end).to(x.dtype), clamp(divide(x, end), low, tl.full(x.shape, 1.0, x.dtype))
    rounded = divide(whole(share * n_steps), n_steps)
    return grad * ((x >= 0.0).to(x.dtype) - above), grad * (above + rounded - share)


@triton.jit
def _store_parts(out, parts, rows, place, exists, n, ADDS: tl.constexpr):
    """Write the parts of a sum, or the sums of rows; an element that does not exist has gradient 0, and adds 0."""
    if ADDS:
        tl.store(out + rows, sum_of_row(parts), mask=rows * 8 < n)
    else:
        tl.store(out + place, parts, mask=exists)


@tuned
@triton.jit(do_not_specialize=["size"])
def _differentiate(
    x, grad, for_x, for_step, for_offset, step, offset, low, high, delta, unit, n, inner, channels, size,
    RULE: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    DELTA: tl.constexpr, UNIT: tl.constexpr, WANTS_X: tl.constexpr, WANTS_STEP: tl.constexpr,
    WANTS_OFFSET: tl.constexpr, ADDS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    given = tl.load(grad + place, mask=exists, other=0.0)
    if OFFSET != -2:
        real = real - number(offset, real, channel, OFFSET)
    through, moved = RULE(
        real, given, number(step, real, channel, STEP), number(low, real, channel, LOW),
        number(high, real, channel, HIGH), number(delta, real, channel, DELTA), number(unit, real, channel, UNIT),
        DELTA != -2,
    )  # fmt: skip
    if WANTS_X:
        tl.store(for_x + place, through, mask=exists)
    if WANTS_STEP:
        _store_parts(for_step, moved, rows, place, exists, n, ADDS)
    if WANTS_OFFSET:
        _store_parts(for_offset, given - through, rows, place, exists, n, ADDS)


@tuned
@triton.jit(do_not_specialize=["size"])
def _clip(
    x, value, inside, above, step, end, high, n, inner, channels, size,
    STEP: tl.constexpr, END: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    unit, zero = number(step, real, channel, STEP), tl.full(real.shape, 0.0, real.dtype)
    code = whole(clamp(divide(real, unit), zero, number(high, real, channel, HIGH)))
    tl.store(value + place, code * unit, mask=exists)
    is_above = exists & (real >= number(end, real, channel, END))
    store_bits(above, rows, is_above, n)
    store_bits(inside, rows, exists & (real >= 0.0) & (is_above == 0), n)


@tuned
@triton.jit(do_not_specialize=["size"])
def _differentiate_clip(
    grad, inside, above, for_x, for_end, n, inner, channels, size,
    WANTS_X: tl.constexpr, WANTS_END: tl.constexpr, ADDS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, place, exists, _ = block(n, inner, channels, WIDE, ROWS)
    given = tl.load(grad + place, mask=exists, other=0.0)
    if WANTS_X:
        tl.store(for_x + place, times_bits(given, inside, rows, n), mask=exists)
    if WANTS_END:
        _store_parts(for_end, times_bits(given, above, rows, n), rows, place, exists, n, ADDS)


class _Sums:
    """Room for the parts of sums over the elements of each channel, or for the sums of rows of these parts."""

    def __init__(self, x: Tensor, shape: Shape) -> None:
        self.x, self.shape = x, shape
        self.adds = shape[1] == 1 or shape[2] % FLAGS == 0

    def room(self, is_wanted: bool) -> Tensor | None:
        n = self.x.numel()
        return self.x.new_empty(-(-n // FLAGS) if self.adds else n) if is_wanted else None

    def total(self, parts: Tensor | None, of: Tensor | None) -> Tensor | None:
        """Return the sums as the gradient of a number, one for each channel or one for all."""
        if parts is None or of is None:
            return None
        outer, channels, _ = self.shape
        kept = (outer, channels, -1) if of.numel() > 1 else (1, 1, -1)
        return parts.view(kept).sum((0, 2), dtype=torch.float64).to(parts.dtype).view(of.shape)


def _backward(
    rule: Any,
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    wanted: tuple[bool, ...],
    low: float,
    high: float,
    offset: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    shape = parts(x, step, *(() if offset is None else (offset,)))
    if shape is None:
        return None
    sums, wants_x, wants_offset = _Sums(x, shape), wanted[0], wanted[2] and offset is not None
    for_x = torch.empty_like(x) if wants_x else None
    of_step, of_offset = sums.room(wanted[1]), sums.room(wants_offset)
    numbers, kinds = read(x, step=step, offset=offset, low=low, high=high, delta=delta, unit=2.0 / (high - low))
    places = (x if place is None else place for place in (for_x, of_step, of_offset))
    wants = {"WANTS_X": wants_x, "WANTS_STEP": wanted[1], "WANTS_OFFSET": wants_offset}
    arguments = x, grad, *places, *numbers, x.numel(), shape[2], shape[1]
    launch(_differentiate, x, *arguments, RULE=rule, ADDS=sums.adds, **wants, **kinds)
    return for_x, sums.total(of_step, step), sums.total(of_offset, offset)


@operation(FLOATS)
def learned_step(x: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None = None) -> Tensor | None:
    """Return `step * round(clamp((x - offset) / step, low, high)) + offset`; None for numbers of other shapes.

    step, offset: in x's type, broadcastable along one axis at most.
    """
    shape = parts(x, step, *(() if offset is None else (offset,)))
    if shape is None:
        return None
    numbers, kinds = read(x, step=step, offset=offset, low=low, high=high)
    value = torch.empty_like(x)
    launch(_learned_step, x, x, value, *numbers, x.numel(), shape[2], shape[1], **kinds)
    return value


@operation(FLOATS)
def learned_step_backward(
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    low: int,
    high: int,
    offset: Tensor | None,
    delta: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients | None:
    """Return the gradients of x, step and offset of `learned_step`, those that are `wanted`.

    delta: () in x's type; None for a gradient that passes as it is. None for numbers of other shapes.
    """
    return _backward(_clamped_first, x, grad, step, wanted, low, high, offset, delta)


@operation(FLOATS)
def rounded_step_backward(
    x: Tensor, grad: Tensor, step: Tensor, low: int, high: int, wanted: tuple[bool, bool]
) -> Gradients | None:
    """Return the gradients of x and step of `step * clamp(round(x / step), low, high)`, those that are `wanted`.

    The rounded code decides what is clipped. None for numbers of other shapes.
    """
    found = _backward(_rounded_first, x, grad, step, (*wanted, False), low, high)
    return None if found is None else found[:2]


@operation(FLOATS)
def calibrated_clip_backward(
    x: Tensor, grad: Tensor, end: Tensor, n_steps: int, wanted: tuple[bool, bool]
) -> Gradients | None:
    """Return the gradients of x and `end` of x on the grid `end / n_steps * {0 .. n_steps}`, those that are `wanted`.

    That of `end` is 1 where x >= end, and the rounding error in units of `end` below. None for numbers of other shapes.
    """
    found = _backward(_calibrated, x, grad, end, (*wanted, False), 0, n_steps)
    return None if found is None else found[:2]


@operation(FLOATS)
def clip(x: Tensor, step: Tensor, end: Tensor, n_steps: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return x on the grid `step * {0 .. n_steps}`, and two packed masks: 1 where 0 <= x < end, and where x >= end.

    step, end: in x's type, broadcastable along one axis at most; None for other shapes.
    """
    shape = parts(x, step, end)
    if shape is None:
        return None
    numbers, kinds = read(x, step=step, end=end, high=n_steps)
    value = torch.empty_like(x)
    inside, above = (x.new_empty(-(-x.numel() // FLAGS), dtype=torch.uint8) for _ in range(2))
    launch(_clip, x, x, value, inside, above, *numbers, x.numel(), shape[2], shape[1], **kinds)
    return value, inside, above


@operation(FLOATS)
def clip_backward(
    grad: Tensor, inside: Tensor, above: Tensor, end: Tensor, wanted: tuple[bool, bool]
) -> Gradients | None:
    """Return the gradients of x and `end`, those that are `wanted`, from the masks of `clip`; None for other shapes."""
    shape = parts(grad, end)
    if shape is None:
        return None
    sums, (wants_x, wants_end) = _Sums(grad, shape), wanted
    for_x, of_end = torch.empty_like(grad) if wants_x else None, sums.room(wants_end)
    places = (grad if place is None else place for place in (for_x, of_end))
    arguments = grad, inside, above, *places, grad.numel(), shape[2], shape[1]
    launch(_differentiate_clip, grad, *arguments, WANTS_X=wants_x, WANTS_END=wants_end, ADDS=sums.adds)
    return for_x, sums.total(of_end, end)
