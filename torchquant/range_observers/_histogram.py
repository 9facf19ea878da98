"""Histograms of rows, by tensor operations only: the same in eager mode, compiled, on any device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant.quantizers_functional._gradient import compute_dtype

AT_ONCE = 2**18  # elements of an intermediate tensor, which then stay in the cache of a processor


class Bins:
    """`n_bins` equal bins per row, from low to high, (C,), low < high; elements outside belong to the end bins.

    An element is placed in its own type, `dtype`, not in float64, which would cost an extra pass: an element within a
    rounding error of an edge may go to either side of it.
    """

    def __init__(self, low: Tensor, high: Tensor, n_bins: int, dtype: torch.dtype) -> None:
        self.n_bins = n_bins
        self.scale = (n_bins / (high - low)).clamp(max=torch.finfo(dtype).max).to(dtype)[:, None]
        self.low = low.to(dtype)[:, None]
        self.zero = self._place(torch.zeros_like(self.low)).nan_to_num_(0.0).to(torch.int64)

    def _place(self, rows: Tensor) -> Tensor:
        return rows.sub(self.low).mul_(self.scale).clamp_(0, self.n_bins - 1)

    def count(self, rows: Tensor, with_zeros: bool = True, of_magnitude: bool = False) -> Tensor:
        """Count the elements of each row in each bin, (C, n_bins) float64; elements that are 0 only if `with_zeros`.

        rows: (C, n), finite, in the bins' type. `of_magnitude`: count |x|.
        """
        kernel = kernels.find("histogram", rows)
        found = None if kernel is None else kernel(rows, self.low, self.scale, self.n_bins, with_zeros, of_magnitude)
        if found is not None:
            return cast(Tensor, found)
        rows = rows.abs() if of_magnitude else rows
        if torch.compiler.is_compiling() or rows.device.type != "cpu":
            index = self._place(rows).nan_to_num_(0.0).to(torch.int64)
            ones = torch.ones((), dtype=torch.float64, device=rows.device).expand(rows.shape)
            counts = torch.zeros(len(rows), self.n_bins, dtype=torch.float64, device=rows.device)
            counts = counts.scatter_add(1, index, ones)
            zeros = [] if with_zeros else [rows.shape[1] - torch.count_nonzero(rows, 1)]
        else:
            pieces = [rows] if rows.numel() <= AT_ONCE else rows.split(max(1, AT_ONCE // len(rows)), 1)
            parts = [self._counted(piece) for piece in pieces]
            counts = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            counts = counts.view(len(rows), self.n_bins).to(torch.float64)
            # A sum of floats is the fastest way to count.
            zeros = [] if with_zeros else [torch.eq(p, 0.0, out=torch.empty_like(p)).sum(1) for p in pieces]
            zeros = [n_zeros for n_zeros in zeros if any(n_zeros.tolist())]
        for n_zeros in zeros:
            counts = counts.scatter_add_(1, self.zero, n_zeros.neg().to(torch.float64)[:, None])
        return counts

    def _counted(self, rows: Tensor) -> Tensor:
        """Return the counts of all rows, flat, by the fastest function on a CPU, which takes 32-bit numbers."""
        n_rows = len(rows)
        index = self._place(rows).to(torch.int32 if n_rows * self.n_bins < 2**31 else torch.int64)
        if n_rows > 1:
            index += torch.arange(n_rows, dtype=index.dtype)[:, None] * self.n_bins
        return torch.bincount(index.reshape(-1), minlength=n_rows * self.n_bins)


def histogram(
    rows: Tensor, low: Tensor, high: Tensor, n_bins: int, with_zeros: bool = True, of_magnitude: bool = False
) -> Tensor:
    """Count (C, n) rows in equal bins from low to high, (C,), as `Bins` does. (C, n_bins) float64."""
    rows = rows.to(compute_dtype(rows))
    return Bins(low, high, n_bins, rows.dtype).count(rows, with_zeros, of_magnitude)


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends, moved apart where they are equal: by a millionth of their size, at least 1e-6."""
    margin = torch.where(high > low, torch.zeros_like(low), (low.abs() * 1e-6).clamp_min(1e-6))
    return low - margin, high + margin


def mass_below(counts: Tensor, low: Tensor, high: Tensor, at: Tensor) -> Tensor:
    """Compute each row's mass below the points `at`, spread evenly in a bin. counts: (C, B); at: (C, k). (C, k)."""
    n_bins = counts.shape[1]
    position = ((at - low[:, None]) * (n_bins / (high - low)[:, None])).clamp(0.0, n_bins)
    index = position.floor().clamp(max=n_bins - 1).to(torch.int64)
    cumulated = torch.cat([torch.zeros_like(counts[:, :1]), counts.cumsum(1)], 1)
    return cumulated.gather(1, index) + (position - index) * counts.gather(1, index)


def bin_edges(low: Tensor, high: Tensor, n_bins: int) -> Tensor:
    """Return the (C, n_bins + 1) edges of equal bins."""
    steps = torch.arange(n_bins + 1, dtype=torch.float64, device=low.device) / n_bins
    return low[:, None] + (high - low)[:, None] * steps


def rebinned(counts: Tensor, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor) -> Tensor:
    """Move the mass to bins over a wider range, by the share of each old bin in each new one."""
    kernel = kernels.find("rebinned", counts)
    moved = None if kernel is None else kernel(counts, low, high, new_low, new_high)
    if moved is not None:
        return cast(Tensor, moved)
    edges = bin_edges(new_low, new_high, counts.shape[1])
    return mass_below(counts, low, high, edges).diff(dim=1)


def quantile(counts: Tensor, low: Tensor, high: Tensor, share: float) -> Tensor:
    """Return the point below which `share` of the mass of each row lies. (C,)."""
    n_bins = counts.shape[1]
    cumulated = counts.cumsum(1)
    wanted = cumulated[:, -1:] * share
    index = (cumulated < wanted).sum(1, keepdim=True).clamp(max=n_bins - 1)
    inside = counts.gather(1, index)
    before = cumulated.gather(1, index) - inside
    fraction = torch.where(inside > 0, (wanted - before) / inside.clamp_min(1e-300), torch.zeros_like(inside))
    return low + (high - low) * ((index + fraction.clamp(0.0, 1.0)) / n_bins).squeeze(1)


def entropy_bins(counts: Tensor, n_levels: int) -> tuple[Tensor, Tensor]:
    """Find how many bins of each row to keep so that `n_levels` levels lose least information; docs/algorithms.md C6.

    counts: (C, B) of magnitudes. For each i from n_levels to B the first i bins, with the mass beyond added to the
    last, are compared with the same bins averaged over n_levels groups. Returns the smallest i of least
    Kullback-Leibler divergence and that divergence, two (C,).
    """
    kept = torch.arange(n_levels, counts.shape[1] + 1, device=counts.device)
    divergences = torch.stack([_divergences(row, kept, n_levels, torch.tensor(n_levels)) for row in counts])
    return kept[divergences.argmin(1)], divergences.amin(1)


def entropy_share(counts: Tensor, n_levels: Tensor, most_levels: int, error: Tensor, stride: int) -> Tensor:
    """Find the share of bins that each row keeps to lose least information, at no more error than all bins have.

    counts: (C, B) of magnitudes. n_levels: (C,), from 1 to `most_levels`. error: (C, B + 1), the squared error when as
    many bins are kept. The divergence counts how much mass goes to the last level, not how far it is moved, so alone it
    cuts off all outliers. Every `stride`-th number of bins is tried, the largest first. (C,).
    """
    kept = torch.arange(counts.shape[1], 0, -stride, device=counts.device)
    is_allowed = (kept >= n_levels[:, None]) & (error[:, kept] <= error[:, -1:])
    is_allowed[:, 0] = True
    is_eager = not torch.compiler.is_compiling() and counts.device.type == "cpu"
    best = []
    for row, levels, allowed in zip(counts, n_levels, is_allowed, strict=True):
        if is_eager:  # widths that are not allowed need not be computed
            tried = kept[allowed]
            best.append(tried[_divergences(row, tried, most_levels, levels).argmin()])
        else:
            divergences = torch.where(allowed, _divergences(row, kept, most_levels, levels), torch.inf)
            best.append(kept.take(divergences.argmin()))  # kept[...] would read the index on the host
    return torch.stack(best) / counts.shape[1]


def clip_error(counts: Tensor, high: Tensor) -> Tensor:
    """Compute the squared error of a clip at each edge. counts: (C, B), equal bins from 0 to high, (C,). (C, B + 1)."""
    width = (high / counts.shape[1])[:, None]
    middles = torch.arange(counts.shape[1], dtype=counts.dtype, device=counts.device) + 0.5
    edges = _from_zero(torch.ones_like(middles))
    mass, first, second = (
        _from_zero(part.flip(1)).flip(1) for part in (counts, counts * middles, counts * (middles.square() + 1 / 12))
    )
    return (second - 2 * edges * first + edges.square() * mass).clamp_min_(0.0) * width.square()


def _from_zero(parts: Tensor) -> Tensor:
    """Compute the cumulative sums of (..., B) numbers, from 0 on, (..., B + 1)."""
    return torch.cat([torch.zeros_like(parts[..., :1]), parts.cumsum(-1)], -1)


def _divergences(counts: Tensor, kept: Tensor, most_levels: int, n_levels: Tensor) -> Tensor:
    """Compute the divergences of C6 if the first `kept` of the (B,) counts are kept. kept: (k,). n_levels: (). (k,).

    All follow from cumulative sums: p is the kept part and the mass beyond, q the mean over a group's occupied bins.
    """
    mass, n_occupied = _from_zero(counts), _from_zero((counts > 0).to(counts.dtype))
    information = _from_zero(torch.xlogy(counts, counts))
    total = counts.sum().clamp_min(1e-300)
    last = counts[kept - 1]
    last_full = last + total - mass[kept]
    # Bins floor(j i / L) .. floor((j + 1) i / L) - 1 are group j; the groups after the L-th are empty.
    group = torch.arange(most_levels + 1, device=counts.device)
    ends = group.minimum(n_levels) * kept[:, None] // n_levels
    is_last = (group[1:] == n_levels).to(counts.dtype)
    full = mass[ends].diff(dim=1)
    # The mass beyond the last bin also occupies that bin.
    last_occupied = ((last == 0) & (last_full > 0)).to(counts.dtype)
    group_occupied = n_occupied[ends].diff(dim=1).addcmul_(last_occupied[:, None], is_last)
    level = full / mass[kept].clamp_min(1e-300)[:, None]
    level = level.div_(group_occupied.clamp_min_(1.0)).clamp_min_(1e-30).log_()
    full = full.addcmul_((last_full - last)[:, None], is_last)
    entropy = (information[kept] - torch.xlogy(last, last) + torch.xlogy(last_full, last_full)) / total - total.log()
    divergences = entropy - (full * level).sum(1) / total
    return torch.where(mass[kept] > 0, divergences, torch.inf)
