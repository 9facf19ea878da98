"""Histograms of rows, by tensor operations only: the same in eager mode, compiled, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def histogram(rows: Tensor, low: Tensor, high: Tensor, n_bins: int) -> Tensor:
    """Counts of each row in equal bins from low to high; what is outside goes to the end bins. (C, n_bins) float64.

    rows: (C, n). low, high: (C,), low < high.
    """
    position = (rows.to(torch.float64) - low[:, None]) * (n_bins / (high - low)[:, None])
    index = position.nan_to_num(0.0).clamp(0, n_bins - 1).to(torch.int64)
    counts = torch.zeros(len(rows), n_bins, dtype=torch.float64, device=rows.device)
    return counts.scatter_add(1, index, torch.ones_like(position))


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The same ends, apart where they were equal: by a millionth of their size, at least 1e-6."""
    margin = torch.where(high > low, torch.zeros_like(low), (low.abs() * 1e-6).clamp_min(1e-6))
    return low - margin, high + margin


def mass_below(counts: Tensor, low: Tensor, high: Tensor, at: Tensor) -> Tensor:
    """Mass of each row below the points `at`, evenly spread inside a bin. counts: (C, B); at: (C, k). (C, k)."""
    n_bins = counts.shape[1]
    position = ((at - low[:, None]) * (n_bins / (high - low)[:, None])).clamp(0.0, n_bins)
    index = position.floor().clamp(max=n_bins - 1).to(torch.int64)
    cumulated = torch.cat([torch.zeros_like(counts[:, :1]), counts.cumsum(1)], 1)
    return cumulated.gather(1, index) + (position - index) * counts.gather(1, index)


def bin_edges(low: Tensor, high: Tensor, n_bins: int) -> Tensor:
    """(C, n_bins + 1) edges of equal bins."""
    steps = torch.arange(n_bins + 1, dtype=torch.float64, device=low.device) / n_bins
    return low[:, None] + (high - low)[:, None] * steps


def rebinned(counts: Tensor, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor) -> Tensor:
    """The same mass in bins over a wider range, by the share of each old bin in each new one."""
    edges = bin_edges(new_low, new_high, counts.shape[1])
    return mass_below(counts, low, high, edges).diff(dim=1)


def quantile(counts: Tensor, low: Tensor, high: Tensor, share: float) -> Tensor:
    """The point below which `share` of the mass of each row lies. (C,)."""
    n_bins = counts.shape[1]
    cumulated = counts.cumsum(1)
    wanted = cumulated[:, -1:] * share
    index = (cumulated < wanted).sum(1, keepdim=True).clamp(max=n_bins - 1)
    inside = counts.gather(1, index)
    before = cumulated.gather(1, index) - inside
    fraction = torch.where(inside > 0, (wanted - before) / inside.clamp_min(1e-300), torch.zeros_like(inside))
    return low + (high - low) * ((index + fraction.clamp(0.0, 1.0)) / n_bins).squeeze(1)


def entropy_bins(counts: Tensor, n_levels: int) -> tuple[Tensor, Tensor]:
    """How many bins of each row to keep so that `n_levels` levels lose the least information; docs/algorithms.md C6.

    counts: (C, B) of magnitudes. For each i from n_levels to B the first i bins, with what is beyond added to the
    last, are compared with the same bins averaged over n_levels groups. Returns the smallest i of least
    Kullback-Leibler divergence and that divergence, two (C,).
    """
    found = [_entropy_bins(row, n_levels) for row in counts]
    return torch.stack([kept for kept, _ in found]), torch.stack([divergence for _, divergence in found])


def _entropy_bins(counts: Tensor, n_levels: int) -> tuple[Tensor, Tensor]:
    n_bins = len(counts)
    kept = torch.arange(n_levels, n_bins + 1, device=counts.device)[:, None]
    bins = torch.arange(n_bins, device=counts.device)[None]
    is_kept = bins < kept
    mass = torch.where(is_kept, counts, torch.zeros_like(counts))
    beyond = counts.sum() - mass.sum(1, keepdim=True)
    full = torch.where(bins == kept - 1, mass + beyond, mass)
    # Bin k belongs to group j when floor(j i / L) <= k < floor((j + 1) i / L).
    group = torch.div((bins + 1) * n_levels - 1, kept, rounding_mode="floor").clamp(max=n_levels - 1)
    occupied = ((full > 0) & is_kept).to(counts.dtype)
    group_mass = torch.zeros(len(kept), n_levels, dtype=counts.dtype, device=counts.device)
    in_group = group_mass.scatter_add(1, group, mass)
    n_occupied = group_mass.scatter_add(1, group, occupied)
    averaged = (in_group / n_occupied.clamp_min(1.0)).gather(1, group) * occupied
    total = averaged.sum(1, keepdim=True)
    p = full / counts.sum().clamp_min(1e-300)
    q = (averaged / total.clamp_min(1e-300)).clamp_min(1e-30)
    divergence = torch.where(p > 0, p * (p.clamp_min(1e-300) / q).log(), torch.zeros_like(p)).sum(1)
    divergence = torch.where(total.squeeze(1) > 0, divergence, torch.full_like(divergence, torch.inf))
    best = divergence.argmin()
    return best + n_levels, divergence.amin()
