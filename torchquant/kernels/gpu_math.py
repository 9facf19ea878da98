"""Find the elements of a block and their numbers, pack masks, and compute by IEEE 754, for all Triton kernels."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block(n, inner, channels, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Return the rows of this block, the places of their 8 elements each, whether these exist, and their channels."""
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    rows = first * ROWS + tl.arange(0, ROWS)
    place = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    return rows, place, place < n, (place // inner) % channels


@triton.jit
def number(n, x, channel, KIND: tl.constexpr):
    """Read a number of the grid for each element of x, or one for all; see `ABSENT` in gpu.py."""
    value = n
    if KIND == -1:
        value = tl.full(x.shape, n, x.dtype)
    if KIND == 0:
        value = tl.load(n)
    if KIND == 1:
        value = tl.load(n + channel)
    return value


@triton.jit
def divide(x, y):
    """Divide as IEEE 754 says; Triton's own division of float32 is off by up to two units in the last place."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def whole(x):
    """Round half to even, with the sign of x on a 0: beyond 2**23 (2**52) a float is whole, below the sum rounds."""
    if x.dtype == tl.float32:
        least_whole = 8388608.0
        is_negative = x.to(tl.int32, bitcast=True) < 0
    else:
        least_whole = 4503599627370496.0
        is_negative = x.to(tl.int64, bitcast=True) < 0
    size = tl.abs(x)
    rounded = tl.where(size < least_whole, (size + least_whole) - least_whole, size)
    return tl.where(is_negative, -rounded, rounded)


@triton.jit
def floor(x):
    """Round down; Triton's own function takes a subnormal number for 0."""
    rounded = whole(x)
    return tl.where(rounded > x, rounded - 1.0, rounded)


@triton.jit
def at_least(x, low):
    """Return the larger of two numbers; NaN if one is, and -0.0 where the lower end is 0."""
    return tl.where(x >= low, x, tl.where(x == x, low, x))


@triton.jit
def at_most(x, high):
    """Return the smaller of two numbers; NaN if one is."""
    return tl.where(x <= high, x, tl.where(x == x, high, x))


@triton.jit
def clamp(x, low, high):
    """Clamp to low, then to high; NaN in any of the three stays, and -0.0 where an end is 0."""
    return at_most(at_least(x, low), high)


@triton.jit
def between(x, low: tl.constexpr, high: tl.constexpr):
    """Clamp to two plain numbers, as `clamp` does."""
    return clamp(x, tl.full(x.shape, low, x.dtype), tl.full(x.shape, high, x.dtype))


@triton.jit
def sum_of_row(x):
    """Add the 8 elements of each row by pairs of neighbours; `tl.sum` adds in an order that depends on the block."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (x.shape[0], 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def store_bits(bits, rows, flags, n):
    """Write a byte of flags for each row."""
    byte = tl.sum(flags.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits + rows, byte.to(tl.uint8), mask=rows * 8 < n)


@triton.jit
def times_bits(x, bits, rows, n):
    """Return x times 1 or 0, from a byte of flags for each row: 0 may be -0.0, and NaN where x is not finite."""
    byte = tl.load(bits + rows, mask=rows * 8 < n, other=0).to(tl.int32)
    is_kept = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1) == 1
    wide = x if x.dtype == tl.float64 else x.to(tl.float32)
    return tl.where(is_kept, x, (wide * 0.0).to(x.dtype))


@triton.jit
def power_below(x):
    """Return the largest power of two not above |x|; 0 for a subnormal x, infinity for NaN."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal_of_power(x):
    """Return 1 / x for a power of two from 2**-126 to 2**126."""
    return ((254 << 23) - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
