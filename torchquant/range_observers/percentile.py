"""Ranges that leave out the outermost elements of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import compute_dtype
from torchquant.range_observers._base import OBSERVERS, RangeObserver
from torchquant.range_observers._distributed import reduce_max, reduce_sum, world_size
from torchquant.range_observers._statistics import ends_of, rows

FEW = 2**13  # elements that are sorted in part at once


@OBSERVERS.register("percentile")
class PercentileObserver(RangeObserver):
    """The range that holds `percentile` percent of the magnitudes of a batch, exactly (docs/algorithms.md C4).

    The clip is the ceil(p n)-th of the n sorted magnitudes; the range never goes beyond the smallest and the largest
    element, so 100 is minimum and maximum. With `low_percentile` the two ends are those percentiles of the
    elements themselves. `momentum` averages over batches as `ExpAvgMinMax` does; ranks of torch.distributed find the
    element of their joined batch.

    >>> observer = PercentileObserver(90.0)
    >>> observer.observe_batch(torch.arange(-3.0, 18.0))
    >>> observer.get_ranges()
    (tensor(-3.), tensor(15.))
    """

    def __init__(
        self,
        percentile: float = 99.99,
        low_percentile: float | None = None,
        momentum: float = 0.0,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if not 0.0 < percentile <= 100.0:
            raise ConfigError(f"percentile must be above 0 and at most 100, got {percentile!r}")
        if low_percentile is not None and not 0.0 <= low_percentile < percentile:
            raise ConfigError(f"low_percentile must be from 0 and below percentile, got {low_percentile!r}")
        super().__init__(momentum, axis, nonfinite)
        self.percentile = percentile
        self.low_percentile = low_percentile

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        lowest, highest = ends_of(x)
        if world_size() > 1:
            negated, highest = reduce_max(torch.stack([-lowest, highest]))
            lowest = -negated
        if self.low_percentile is None:
            if world_size() == 1 and _place(self.percentile, x.shape[1]) == x.shape[1]:  # nothing is cut off
                return (lowest, highest) if self.axis is not None else (lowest[0], highest[0])
            is_eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
            is_magnitude = is_eager and bool((lowest >= 0).all())
            clip = _percentile(x if is_magnitude else x.abs(), self.percentile)
            low, high = torch.maximum(lowest, -clip), torch.minimum(highest, clip)
        else:
            low, high = _percentile(x, self.low_percentile), _percentile(x, self.percentile)
        # NaN and Inf of x must be refused, even if they are cut off.
        refused = torch.where(highest.isfinite() & lowest.isfinite(), 0.0, torch.nan).to(x.dtype)
        low, high = low + refused, high + refused
        return (low, high) if self.axis is not None else (low[0], high[0])


def _place(percentile: float, n: int) -> int:
    """Compute ceil(p n), p in percent; at least 1."""
    return min(max(math.ceil(percentile / 100.0 * n), 1), n)


def _percentile(x: Tensor, percentile: float) -> Tensor:
    """Return the ceil(p n)-th smallest of each row, p in percent; the smallest for p = 0."""
    if world_size() > 1:
        return _percentile_of_ranks(x, percentile)
    n = x.shape[1]
    k = _place(percentile, n)
    if len(x) == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _kth_largest(x[0], n - k + 1).view(1) if 2 * k > n else _kth_largest(-x[0], k).neg().view(1)
    return x.kthvalue(k, 1).values


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """Return the k-th largest of x, (n,), faster than by a partial sort if k is small.

    At least k of sqrt(n k) blocks have an element not below the k-th largest of their maxima: so the k-th largest of
    all is not below that either, and the blocks below it need not be searched.
    """
    n_blocks = math.isqrt(len(x) * k)
    width = len(x) // max(n_blocks, 1)
    if width < 4 or len(x) < FEW:
        return x.kthvalue(len(x) - k + 1).values
    blocks, rest = x[: width * n_blocks].view(width, n_blocks), x[width * n_blocks :]
    largest = blocks.amax(0)
    least = largest.kthvalue(n_blocks - k + 1).values
    if not bool((least < largest).any()) and not bool(
        (least < rest).any()
    ):  # for example if many elements equal the largest one, or one is NaN
        return least
    kept = torch.cat([blocks.index_select(1, (largest >= least).nonzero().squeeze(1)).flatten(), rest])
    return kept.kthvalue(len(kept) - k + 1).values


def _percentile_of_ranks(x: Tensor, percentile: float) -> Tensor:
    """Compute the percentile of the rows of all ranks: its bits, byte by byte from the highest, by counting."""
    real = x.to(compute_dtype(x))
    n_bytes = real.element_size()
    whole, turned = (torch.int64, 2**63 - 1) if n_bytes == 8 else (torch.int32, 2**31 - 1)
    total = reduce_sum(torch.full((len(x), 1), x.shape[1], dtype=torch.float64, device=x.device))
    place = torch.minimum((percentile / 100.0 * total).ceil().clamp_min(1.0), total)
    # Integers that rise with the real numbers: all bits of a negative number but the sign are flipped.
    bits = real.view(whole).to(torch.int64)
    keys = torch.where(bits < 0, bits ^ turned, bits)
    counted, found = torch.ones_like(keys, dtype=torch.float64), torch.zeros_like(keys[:, :1])
    for byte in reversed(range(n_bytes)):
        highest = byte == n_bytes - 1
        digits = (keys >> 8 * byte) + 128 if highest else keys >> 8 * byte & 255
        counts = reduce_sum(counted.new_zeros(len(keys), 256).scatter_add(1, digits, counted))
        below = counts.cumsum(1)
        digit = (below < place).sum(1, keepdim=True).clamp(max=255)
        place = place - below.gather(1, digit) + counts.gather(1, digit)
        counted = counted * (digits == digit)
        found = digit - 128 if highest else found << 8 | digit
    bits = torch.where(found < 0, found ^ turned, found)
    return bits.to(whole).view(real.dtype).squeeze(1).to(x.dtype)
