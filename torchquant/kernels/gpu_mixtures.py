"""The kernels on a GPU of weighted sums of projections: one pass over x forward, one backward, for any number of them.

The members of a mixture are part of the code, so that each set of candidates is compiled once.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant.kernels.cpu import along
from torchquant.kernels.cpu_mixtures import Members
from torchquant.kernels.gpu import EACH, FLAGS, SINGLE, launch, operation, read, tuned
from torchquant.kernels.gpu_forms import (
    floats,
    midrise,
    powers_of_two,
    shifted_floats,
    shifted_midrise,
    ternary,
    uniform,
)
from torchquant.kernels.gpu_math import at_least, at_most, between, block, number, sum_of_row

FLOAT32 = (torch.float32,)


@triton.jit
def _nearest_level(v, numbers, channel, channels, N: tl.constexpr, EACH: tl.constexpr):
    """Return the nearest of N sorted levels, midpoints down, and whether v is between the lowest and the highest."""
    lowest = number(numbers, v, channel, EACH)
    below, level = lowest, tl.broadcast_to(lowest, v.shape)
    for i in range(1, N):
        above = number(numbers + i * channels, v, channel, EACH)
        level = tl.where(v > (above + below) * 0.5, above, level)
        below = above
    return level + between(v, 0.0, 0.0), (v >= lowest) & (v <= below)


@triton.jit
def _projected(v, numbers, channel, channels, NAME: tl.constexpr, N: tl.constexpr, CONSTANTS: tl.constexpr,
               EACH: tl.constexpr):  # fmt: skip
    """Return the projection by a member with N rows of numbers, and whether v is not clipped."""
    if NAME == "levels":
        level, inside = _nearest_level(v, numbers, channel, channels, N, EACH)
    else:
        a = number(numbers, v, channel, EACH)
        b = number(numbers + (channels if N > 1 else 0), v, channel, EACH)
        c = number(numbers + (2 * channels if N > 2 else 0), v, channel, EACH)
        if NAME == "ternary":
            level, inside = ternary(v, a, b, c, CONSTANTS)
        elif NAME == "powers_of_two":
            level, inside = powers_of_two(v, a, b, c, CONSTANTS)
        elif NAME == "floats":
            level, inside = floats(v, a, b, c, CONSTANTS)
        elif NAME == "shifted_floats":
            level, inside = shifted_floats(v, a, b, c, CONSTANTS)
        elif NAME == "midrise":
            level, inside = midrise(v, a, b, c, CONSTANTS)
        elif NAME == "shifted_midrise":
            level, inside = shifted_midrise(v, a, b, c, CONSTANTS)
        else:
            level, inside = uniform(v, a, b, c, CONSTANTS)
    return level, inside


@triton.jit
def _clamped(x, low, high, channel, LOW: tl.constexpr, HIGH: tl.constexpr):
    clamped = x
    if LOW != -2:
        clamped = at_least(clamped, number(low, x, channel, LOW))
    if HIGH != -2:
        clamped = at_most(clamped, number(high, x, channel, HIGH))
    return clamped


@tuned
@triton.jit(do_not_specialize=["size"])
def _mix(
    x, value, numbers, shares, low, high, n, inner, channels, size,
    MEMBERS: tl.constexpr, EACH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    clamped = _clamped(real, low, high, channel, LOW, HIGH)
    total = tl.zeros(real.shape, real.dtype)
    for k in tl.static_range(len(MEMBERS)):
        level, _ = _projected(
            clamped, numbers + MEMBERS[k][1] * channels, channel, channels,
            MEMBERS[k][0], MEMBERS[k][2], MEMBERS[k][4], EACH,
        )  # fmt: skip
        part = level * tl.load(shares + k)
        total = part if k == 0 else total + part
    tl.store(value + place, total, mask=exists)


@tuned
@triton.jit(do_not_specialize=["size"])
def _differentiate_mix(
    x, grad, for_x, sums, numbers, shares, low, high, n, inner, channels, size,
    MEMBERS: tl.constexpr, EACH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WANTS_X: tl.constexpr, WANTS_SHARES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    given = tl.load(grad + place, mask=exists, other=0.0)
    clamped = _clamped(real, low, high, channel, LOW, HIGH)
    total = tl.zeros(real.shape, real.dtype)
    for k in tl.static_range(len(MEMBERS)):
        level, inside = _projected(
            clamped, numbers + MEMBERS[k][1] * channels, channel, channels,
            MEMBERS[k][0], MEMBERS[k][2], MEMBERS[k][4], EACH,
        )  # fmt: skip
        if WANTS_SHARES:
            tl.store(sums + k * tl.cdiv(n, 8) + rows, sum_of_row(given * level), mask=rows * 8 < n)
        part = given * tl.load(shares + k)
        if MEMBERS[k][3]:
            part = part * inside.to(part.dtype)
        total = part if k == 0 else total + part
    if WANTS_X:
        if LOW != -2:
            total = tl.where(real <= number(low, real, channel, LOW), 0.0, total)
        if HIGH != -2:
            total = tl.where(real >= number(high, real, channel, HIGH), 0.0, total)
        tl.store(for_x + place, total, mask=exists)


def _given(x: Tensor, shares: Tensor, members: Members) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a kernel for all but x and its gradients, and its constants."""
    shape = (1, 1, x.numel()) if members.axis is None else along(x, members.axis % x.ndim)
    own, row = [], 0
    for (name, constants), n_rows, clips in zip(members.kernels, members.rows, members.clips, strict=True):
        own.append((name, row, n_rows, clips, tuple(map(float, constants))))
        row += n_rows
    (low, high), kinds = read(x, **dict(zip(("low", "high"), members.clamp or (None, None), strict=True)))
    kinds["EACH"] = SINGLE if members.axis is None else EACH
    arguments = [members.numbers.contiguous(), shares.contiguous(), low, high, x.numel(), shape[2], shape[1]]
    return arguments, {"MEMBERS": tuple(own), **kinds}


@operation(FLOAT32)
def mixture(x: Tensor, shares: Tensor, members: Members) -> Tensor:
    """Return the sum of the projections of x times shares, (K,) float32, added in order."""
    arguments, constants = _given(x, shares, members)
    value = torch.empty_like(x)
    launch(_mix, x, x, value, *arguments, **constants)
    return value


@operation(FLOAT32)
def mixture_backward(
    x: Tensor, grad: Tensor, shares: Tensor, members: Members, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of the shares of `mixture`, those that are `wanted`; the latter in float64.

    The latter are sums in the order that gpu_learned.py states.
    """
    arguments, constants = _given(x, shares, members)
    for_x = torch.empty_like(x) if wanted[0] else None
    sums = x.new_empty((len(shares), -(-x.numel() // FLAGS))) if wanted[1] else None
    places = (x if place is None else place for place in (for_x, sums))
    wants = {"WANTS_X": wanted[0], "WANTS_SHARES": wanted[1]}
    launch(_differentiate_mix, x, x, grad, *places, *arguments, **wants, **constants)
    return for_x, None if sums is None else sums.sum(1, dtype=torch.float64)
