"""The range whose uniform grid has the least error on a histogram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._tensors import constant
from torchquant.quantizers_functional.affine import AffineParams, affine_params
from torchquant.quantizers_functional.formats import Format, UniformGrid
from torchquant.range_observers._histogram import bin_edges

RATIO = 0.6  # ratio of successive first factors
N_FACTORS = 10  # the last of them 1/99
ROUNDS = 6  # rounds of refinement: the last factors are 0.8 % apart

ErrorOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RangeErrors:
    """Errors (C, g) of ranges with the ends (C, g) and (C, g). `least`: a lower bound that is faster to compute."""

    of: ErrorOf
    least: ErrorOf | None = None


class SquaredError:
    """The exact squared error of uniform grids on rows of counts, with the mass of a bin spread evenly inside it.

    With F(t) the mass below t, H its integral and l the highest level, the error of a grid with the step d and the
    thresholds t is the mean of (x - l)**2 less 2 d times the sum of H(t): the mass left of a threshold moves down a
    level. H is a parabola inside a bin, so a grid costs as much as it has thresholds, however many elements were seen.

    counts: (C, B) in equal bins from low to high, (C,).
    """

    def __init__(self, counts: Tensor, low: Tensor, high: Tensor) -> None:
        self.n_bins = counts.shape[1]
        self.low, self.width = low[:, None], ((high - low) / self.n_bins)[:, None]
        self.density = counts / self.width
        self.mass = _cumulated(counts)
        self.first = _cumulated((self.mass[:, :-1] + counts / 2) * self.width)
        self.second = _cumulated((self.first[:, :-1] + (self.mass[:, :-1] / 2 + counts / 6) * self.width) * self.width)
        edges = bin_edges(low, high, self.n_bins)
        middles = (edges[:, 1:] + edges[:, :-1]) / 2
        self.total = counts.sum(1, keepdim=True).clamp_min(1e-300)
        self.mean = (counts * middles).sum(1, keepdim=True) / self.total
        spread = (middles - self.mean).square() + self.width.square() / 12
        self.variance = (counts * spread).sum(1, keepdim=True)

    def __call__(self, params: AffineParams) -> Tensor:
        """Return the (C, g) errors, over a row's total mass, of grids; delta (C, g), zero_point (C, g) or a number."""
        delta, zero_point, qmin, qmax = params
        highest, lowest = _end_levels(params)
        error = self.variance + self.total * (highest - self.mean).square()
        if qmax - qmin <= self.n_bins:
            codes = torch.arange(qmin, qmax, dtype=delta.dtype, device=delta.device) + 0.5
            offset = zero_point[..., None] if isinstance(zero_point, Tensor) else zero_point
            at = (codes - offset) * delta[..., None]
            return error - 2 * delta * self._integral(at.flatten(1)).unflatten(1, at.shape[1:]).sum(-1)
        # Levels closer together than the bins: the sum becomes an integral, less the part within a step, d**2 / 12.
        within = self._double_integral(highest) - self._double_integral(lowest)
        return error - 2 * within + delta.square() / 12 * (self._mass(highest) - self._mass(lowest))

    def clipping(self, params: AffineParams) -> Tensor:
        """Return the (C, g) part of the errors from beyond the last levels, less its own possible error."""
        highest, lowest = _end_levels(params)
        above, below = self._double_integral(torch.cat([highest, lowest], 1)).chunk(2, 1)
        rounding = 1e-11 * self.total * (self.width * self.n_bins).square()
        return self.variance + self.total * (highest - self.mean).square() - 2 * (above - below) - rounding

    def _place(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bin, distance from its first edge, and distance beyond the last edge, of points (C, k)."""
        position = (at - self.low) / self.width
        index = position.clamp(0, self.n_bins - 1).to(torch.int64)
        inside = (position.clamp(0, self.n_bins) - index) * self.width
        return index, inside, (position - self.n_bins).clamp_min_(0.0) * self.width

    def _mass(self, at: Tensor) -> Tensor:
        index, inside, _ = self._place(at)
        return self.mass.gather(1, index) + self.density.gather(1, index) * inside

    def _integral(self, at: Tensor) -> Tensor:
        index, inside, beyond = self._place(at)
        slope = self.density.gather(1, index).mul_(inside / 2).add_(self.mass.gather(1, index))
        return slope.mul_(inside).add_(self.first.gather(1, index)).add_(beyond.mul_(self.total))

    def _double_integral(self, at: Tensor) -> Tensor:
        index, inside, beyond = self._place(at)
        mass, density = self.mass.gather(1, index), self.density.gather(1, index)
        below = self.second.gather(1, index) + inside * (
            self.first.gather(1, index) + inside * (mass / 2 + inside * density / 6)
        )
        return below + beyond * (self.first[:, -1:] + self.total * beyond / 2)


def _end_levels(params: AffineParams) -> tuple[Tensor, Tensor]:
    delta, zero_point, qmin, qmax = params
    return (qmax - zero_point) * delta, (qmin - zero_point) * delta


def _cumulated(parts: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(parts[:, :1]), parts.cumsum(1)], 1)


def histogram_error(
    counts: Tensor, low: Tensor, high: Tensor, n_bits: int, symmetric: bool | str, power: float
) -> RangeErrors:
    """Make the errors |x - Q(x)|**power of affine grids on a histogram; for powers other than 2 at bin midpoints."""
    if power == 2.0:
        squared = SquaredError(counts, low, high)
        return RangeErrors(
            lambda low, high: squared(affine_params(low, high, n_bits, symmetric)),
            lambda low, high: squared.clipping(affine_params(low, high, n_bits, symmetric)),
        )
    return format_error(
        counts, low, high, lambda low, high: UniformGrid(*affine_params(low, high, n_bits, symmetric)), power
    )


def format_error(
    counts: Tensor, low: Tensor, high: Tensor, format_over: Callable[[Tensor, Tensor], Format], power: float
) -> RangeErrors:
    """Make the errors |x - Q(x)|**power of the formats over ranges, at the midpoints of the bins of a histogram."""
    edges = bin_edges(low, high, counts.shape[1])
    middles = ((edges[:, 1:] + edges[:, :-1]) / 2)[:, None]

    def error(low: Tensor, high: Tensor) -> Tensor:
        form = format_over(low[..., None], high[..., None])
        quantized, _ = form.project(middles.expand(-1, low.shape[1], -1))
        return quantized.sub_(middles).abs_().pow_(power).mul_(counts[:, None]).sum(-1)

    return RangeErrors(error)


def least_error_range(errors: RangeErrors, low: Tensor, high: Tensor, is_symmetric: bool) -> tuple[Tensor, Tensor]:
    """Find the range of least error inside [low, high], (C,) each. Equal errors: the widest.

    The ends are shrunk by factors, both by the same where the grid is symmetric: first by the powers of `RATIO`,
    then by factors nearer and nearer to the best so far.
    """
    is_eager = not torch.compiler.is_compiling() and low.device.type == "cpu"
    if is_eager:
        is_symmetric = is_symmetric or bool(torch.logical_or(low >= 0, high <= 0).all())  # 0 is in every range
    factors = RATIO ** torch.arange(N_FACTORS, dtype=low.dtype, device=low.device)
    offsets = constant([0.0, -1.0, 1.0], low.dtype, low.device)
    best, known = factors.new_ones(2, len(low), 1), None
    for round in range(ROUNDS + 1):
        tried = factors if round == 0 else RATIO ** (offsets / 2**round)
        pairs = torch.stack([tried, tried] if is_symmetric else torch.meshgrid(tried, tried, indexing="ij")).flatten(1)
        candidates = (best * pairs[:, None]).clamp(max=1.0)
        ends = low[:, None] * candidates[0], high[:, None] * candidates[1]
        if is_eager:
            is_other = ((candidates != best) | (pairs[:, None] == 1.0)).all(0)
            found = _errors_that_matter(errors, *ends, known, is_other)
            known = found.amin(1, keepdim=True)
        else:
            found = errors.of(*ends)
        best = candidates.gather(2, found.argmin(1, keepdim=True).expand(2, -1, -1))
    return low * best[0, :, 0], high * best[1, :, 0]


def _errors_that_matter(
    errors: RangeErrors, low: Tensor, high: Tensor, known: Tensor | None, is_other: Tensor
) -> Tensor:
    """Compute the errors (C, g) of the ranges that may be better than the first of each row; others may be infinite.

    known: (C, 1), the error of the first. is_other: (C, g), whether a range differs from all before it.
    """
    if known is None:
        known = errors.of(low[:, :1], high[:, :1])
        if errors.least is not None:
            is_other = is_other & (errors.least(low, high) <= known * (1 + 1e-6))
    columns = is_other[:, 1:].any(0).nonzero().squeeze(1) + 1
    found = torch.full_like(low, torch.inf).index_copy_(1, columns.new_zeros(1), known)
    if len(columns):
        found.index_copy_(1, columns, errors.of(low.index_select(1, columns), high.index_select(1, columns)))
    return found
