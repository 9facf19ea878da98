"""Formats of a few fixed numbers times a scale, for Triton kernels, as `forms.h` has them for those in C++.

A form returns the projection of v, and whether v is not clipped. It gets three numbers of the channel and a tuple of
constants: those of the format's `kernel()`.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from torchquant.kernels.gpu_math import (
    between,
    clamp,
    divide,
    floor,
    power_below,
    reciprocal_of_power,
    whole,
)


@triton.jit
def signs(v, scale, other, third, constants: tl.constexpr):
    """Return the scale times 1 where v >= 0, else -1."""
    code = between(v, 0.0, 0.0) + (v >= 0.0).to(v.dtype)
    return (code * 2.0 - 1.0) * scale, tl.abs(v) <= 1.5 * scale


@triton.jit
def ternary(v, scale, threshold, third, constants: tl.constexpr):
    """Return `scale * sign(v)` where |v| is above the threshold, else 0."""
    sign = (v > 0.0).to(v.dtype) - (v < 0.0).to(v.dtype)
    zero_or_nan = between(v, 0.0, 1.0) * 0.0
    return ((tl.abs(v) > threshold).to(v.dtype) * sign + zero_or_nan) * scale, tl.abs(v) <= 1.5 * scale


@triton.jit
def powers_of_two(v, scale, other, third, constants: tl.constexpr):
    """Return the scale times `+-2**i`, from 1 to a largest power, which is the constant."""
    scaled = divide(tl.abs(v), tl.where(scale > 0.0, scale, 1.0))
    lower = power_below(divide(scaled, tl.full(v.shape, 1.5, v.dtype)))
    magnitude = between(lower * 2.0, 1.0, constants[0]) + between(scaled, 0.0, 1.0) * 0.0
    return magnitude * tl.where(v >= 0.0, 1.0, -1.0) * scale, tl.abs(v) <= scale * constants[0]


@triton.jit
def _nearest_float(v, scale, constants: tl.constexpr):
    """Return the nearest number times the scale; constants: smallest normal, largest power, spacing at 1, largest."""
    scaled = divide(v, scale)
    spacing = between(power_below(scaled), constants[0], constants[1]) * constants[2]
    nearest = whole(scaled * reciprocal_of_power(spacing)) * spacing
    return between(nearest, -constants[3], constants[3]) * scale


@triton.jit
def floats(v, scale, other, third, constants: tl.constexpr):
    """Return the nearest mini-float times the scale; constants as in `_nearest_float`."""
    return _nearest_float(v, scale, constants), tl.abs(v) <= scale * constants[3]


@triton.jit
def shifted_floats(v, scale, shift, third, constants: tl.constexpr):
    """Return what `floats` does, on levels that are shifted."""
    centred = v - shift
    return _nearest_float(centred, scale, constants) + shift, tl.abs(centred) <= scale * constants[3]


@triton.jit
def _middle(v, scale, cell, constants: tl.constexpr):
    """Return the middle of the cell of v, times the scale."""
    code = floor(divide(v, tl.where(cell > 0.0, cell, 1.0)))
    return (between(code, constants[0], constants[1]) + 0.5) * scale


@triton.jit
def midrise(v, scale, cell, third, constants: tl.constexpr):
    """Return the middle of the cell of v times the scale; constants: lowest and highest code."""
    return _middle(v, scale, cell, constants), tl.abs(v) <= cell * (constants[1] + 1.0)


@triton.jit
def shifted_midrise(v, scale, cell, shift, constants: tl.constexpr):
    """Return what `midrise` does, on levels and cells that are shifted."""
    centred = v - shift
    return _middle(centred, scale, cell, constants) + shift, tl.abs(centred) <= cell * (constants[1] + 1.0)


@triton.jit
def uniform(v, step, low, high, constants: tl.constexpr):
    """Return the nearest level of a uniform grid whose codes, from low to high, are counted from real 0."""
    rounded = whole(divide(v, step))
    code = clamp(rounded, low, high)
    return code * step, code == rounded


FORMS = {
    form.__name__: form for form in (signs, ternary, powers_of_two, floats, shifted_floats, midrise, shifted_midrise)
}
"""Name of a kernel -> its form."""
