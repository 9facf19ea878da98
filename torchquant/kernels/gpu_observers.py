"""The kernels on a GPU of range observers: ends, averages of ends, and histograms.

Smallest and largest numbers, and counts, are the same in whatever order blocks come.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant.kernels._bounds import Clamp
from torchquant.kernels.cpu import FLOATS, along
from torchquant.kernels.gpu import operation, read, run, tuned
from torchquant.kernels.gpu_math import at_least, at_most, number

PROGRAMS, LEAST_SHARE = 1024, 4096
"""About how many programs share a tensor, and the fewest elements that one of them takes."""
ACROSS = 32
"""Channels of a tile where channels are next to each other in memory."""
CHANNELS_AT_ONCE = 512
MOST_BINS = 4096
"""The largest number of bins that a program can keep."""


@tuned
@triton.jit(do_not_specialize=["size"])
def _ends(
    x, lows, highs, n, share, inner, channels, size,
    TILE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Find the ends of a share of the n elements of each of TILE channels."""
    depth: tl.constexpr = ROWS * 8 // TILE
    channel, part, step = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1), tl.arange(0, depth)
    if WIDE:
        channel, part, step = channel.to(tl.int64), part.to(tl.int64), step.to(tl.int64)
    is_channel = channel < channels
    dtype: tl.constexpr = x.dtype.element_ty
    low = tl.full((depth, TILE), float("inf"), dtype)
    high = tl.full((depth, TILE), float("-inf"), dtype)
    nans = tl.full((depth, TILE), 0, tl.int32)
    last = tl.minimum((part + 1) * share, n)
    for start in range(part * share, last, depth):
        at = start + step
        exists = (at < last)[:, None] & is_channel[None, :]
        place = (at // inner * channels * inner + at % inner)[:, None] + (channel * inner)[None, :]
        real = tl.load(x + place, mask=exists, other=0.0)
        nans = nans | (real != real).to(tl.int32)
        low = tl.where(exists & (real < low), real, low)
        high = tl.where(exists & (real > high), real, high)
    is_nan, nan = tl.max(nans, axis=0) > 0, tl.full((TILE,), float("nan"), dtype)
    place = part * channels + channel
    tl.store(lows + place, tl.where(is_nan, nan, tl.min(low, axis=0)), mask=is_channel)
    tl.store(highs + place, tl.where(is_nan, nan, tl.max(high, axis=0)), mask=is_channel)


@triton.jit
def _taken(low, high, range_min, range_max, channel, channels, is_observed, least, most,
           JOINS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """Return the ends of a tensor, joined with those of the range, and clamped."""
    is_channel = channel < channels
    lower, upper = (
        tl.load(low + channel, mask=is_channel, other=0.0),
        tl.load(high + channel, mask=is_channel, other=0.0),
    )
    if JOINS:
        held = tl.load(range_min + channel, mask=is_channel, other=0.0)
        lower = tl.where(is_observed, at_most(lower, held), lower)
        held = tl.load(range_max + channel, mask=is_channel, other=0.0)
        upper = tl.where(is_observed, at_least(upper, held), upper)
    if LEAST != -2:
        end = number(least, lower, channel, LEAST)
        lower, upper = at_least(lower, end), at_least(upper, end)
    if MOST != -2:
        end = number(most, lower, channel, MOST)
        lower, upper = at_most(lower, end), at_most(upper, end)
    return lower, upper


@triton.jit
def _moved(held, value, rate):
    """Return a number that is moved by a share of the way to a finite value, in float64."""
    value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    return (held.to(tl.float64) * (1.0 - rate) + value.to(tl.float64) * rate).to(held.dtype)


@triton.jit
def _average(
    low, high, range_min, range_max, weight, least, most, channels,
    MOMENTUM: tl.constexpr, STARTS: tl.constexpr, JOINS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    AT_ONCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Average the ends of a tensor into the range of each channel, in one program; nothing if an end is not finite."""
    seen, lane = tl.load(weight), tl.arange(0, AT_ONCE)
    is_observed, n_refused = seen > 0.0, 0
    for start in range(0, channels, AT_ONCE):
        lower, upper = _taken(low, high, range_min, range_max, start + lane, channels, is_observed, least, most,
                              JOINS, LEAST, MOST)  # fmt: skip
        is_finite = (tl.abs(lower) < float("inf")) & (tl.abs(upper) < float("inf"))
        n_refused += tl.sum((is_finite == 0).to(tl.int32))
    one, momentum = tl.full((), 1.0, tl.float64), tl.full((), MOMENTUM, tl.float64)
    usable, fresh = tl.where(n_refused == 0, one, 0.0), tl.full((), 1.0 - MOMENTUM, tl.float64)
    if STARTS:
        fresh = tl.where(is_observed, fresh, one)
    total = tl.where(is_observed, seen, 0.0).to(tl.float64) * momentum + fresh
    share = fresh / total if STARTS else one / total * fresh  # so PyTorch divides a plain number by a tensor
    rate = share * usable
    for start in range(0, channels, AT_ONCE):
        channel = start + lane
        lower, upper = _taken(low, high, range_min, range_max, channel, channels, is_observed, least, most,
                              JOINS, LEAST, MOST)  # fmt: skip
        lowest = tl.load(range_min + channel, mask=channel < channels, other=0.0)
        highest = tl.load(range_max + channel, mask=channel < channels, other=0.0)
        tl.debug_barrier()  # other threads have read before the first one writes
        tl.store(range_min + channel, _moved(lowest, lower, rate), mask=channel < channels)
        tl.store(range_max + channel, _moved(highest, upper, rate), mask=channel < channels)
    tl.store(weight, _moved(seen, total, usable))


@partial(tuned, resets=("counts",))
@triton.jit(do_not_specialize=["size"])
def _histogram(
    x, counts, low, scale, n, share, n_bins, size,
    BINS: tl.constexpr, WITH_ZEROS: tl.constexpr, MAGNITUDE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Count a share of the n elements of a row; numbers of bins are whole, so that atomics keep them exact."""
    row, part, step = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS * 8)
    if WIDE:
        row, part, step = row.to(tl.int64), part.to(tl.int64), step.to(tl.int64)
    first, per, bins = tl.load(low + row), tl.load(scale + row), tl.arange(0, BINS)
    top, found, last = (n_bins - 1).to(first.dtype), tl.zeros((BINS,), tl.int32), tl.minimum((part + 1) * share, n)
    for start in range(part * share, last, ROWS * 8):
        at = start + step
        is_counted = at < last
        real = tl.load(x + row * n + at, mask=is_counted, other=0.0)
        if MAGNITUDE:
            real = tl.abs(real)
        if not WITH_ZEROS:
            is_counted = is_counted & (real != 0.0)
        place = (real - first) * per
        place = tl.where(place > 0.0, place, 0.0)  # of NaN too
        place = tl.where(place > top, top, place)
        found += tl.histogram(place.to(tl.int32), BINS, mask=is_counted)
    tl.atomic_add(counts + row * n_bins + bins, found.to(tl.int64), mask=(bins < n_bins) & (found > 0))


def _shares(n: int, n_others: int) -> tuple[int, int]:
    """Return how many programs share n elements, and how many each takes, where so many others run beside them."""
    n_parts = max(1, min(PROGRAMS // n_others, -(-n // LEAST_SHARE)))
    return n_parts, -(-n // n_parts)


@operation(FLOATS)
def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element, () each, or of each slice of an axis, (C,); NaN if there is one."""
    outer, channels, inner = (1, 1, x.numel()) if axis is None else along(x, axis % x.ndim)
    tile, n = ACROSS if inner == 1 and channels > 1 else 1, outer * inner
    n_tiles = -(-channels // tile)
    n_parts, share = _shares(n, n_tiles)
    lows, highs = x.new_empty((2, n_parts, channels))
    arguments = x, lows, highs, n, share, inner, channels, x.numel().bit_length()
    run(_ends, x, (n_tiles, n_parts), *arguments, TILE=tile)
    low, high = lows.amin(0), highs.amax(0)
    return (low.squeeze(0), high.squeeze(0)) if axis is None else (low, high)


@operation(FLOATS)
def track(
    x: Tensor,
    range_min: Tensor,
    range_max: Tensor,
    weight: Tensor,
    axis: int | None,
    clamp: Clamp | None,
    momentum: float,
    starts_at_first: bool = False,
    joins: bool = False,
) -> bool:
    """Average the ends of `x.clamp(*clamp)` into a range, in place, and count it in `weight`.

    Where an end is not finite, nothing changes. Returns False where the range is not of x's type and device.
    `starts_at_first`: the first tensor counts alone. `joins`: the range never shrinks.
    """
    held = range_min, range_max, weight
    if any(t.dtype != x.dtype or t.device != x.device or not t.is_contiguous() for t in held):
        return False
    low, high = min_max(x, None if x.ndim == 0 else axis)
    (least, most), kinds = read(x, **dict(zip(("least", "most"), clamp or (None, None), strict=True)))
    flags = {"MOMENTUM": momentum, "STARTS": starts_at_first, "JOINS": joins, "AT_ONCE": CHANNELS_AT_ONCE}
    run(_average, x, (1,), low, high, *held, least, most, low.numel(), **flags, **kinds)
    torch.autograd.graph.increment_version(held)
    return True


@operation(FLOATS)
def histogram(
    x: Tensor, low: Tensor, scale: Tensor, n_bins: int, with_zeros: bool = True, of_magnitude: bool = False
) -> Tensor | None:
    """Count the elements of each row in each bin `clamp((x - low) * scale, 0, n_bins - 1)`, (C, n_bins) float64.

    x: (C, n). low, scale: (C, 1). Elements that are 0 count only `with_zeros`; `of_magnitude`: |x| is counted. None for
    more than `MOST_BINS`.
    """
    if n_bins > MOST_BINS:
        return None
    (n_rows, n), size = x.shape, x.numel().bit_length()
    n_parts, share = _shares(n, n_rows)
    counts = x.new_zeros((n_rows, n_bins), dtype=torch.int64)
    flags = {"BINS": triton.next_power_of_2(n_bins), "WITH_ZEROS": with_zeros, "MAGNITUDE": of_magnitude}
    arguments = x, counts, low.contiguous(), scale.contiguous(), n, share, n_bins, size
    run(_histogram, x, (n_rows, n_parts), *arguments, **flags)
    return counts.to(torch.float64)
