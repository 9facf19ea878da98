"""Ranges from the moments of a batch: a multiple of the deviation, and the analytic clips of ACIQ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._row_statistics import cut_off, distances, row_moments, wide_means
from torchquant.range_observers._base import OBSERVERS, RangeObserver
from torchquant.range_observers._distributed import ranks, reduce_max
from torchquant.range_observers._pins import HALF_TYPES
from torchquant.range_observers._statistics import ends_of, rows

# n_bits -> clip of least modelled error, in standard deviations of a Gaussian; docs/algorithms.md H7.
ACIQ_GAUSS = {
    1: 1.23990527,
    2: 1.71063517,
    3: 2.15159274,
    4: 2.55913646,
    5: 2.93620061,
    6: 3.28691421,
    7: 3.61511422,
    8: 3.92403549,
    9: 4.21632983,
}
# The same in mean absolute deviations of a Laplace distribution.
ACIQ_LAPLACE = {
    1: 1.86281686,
    2: 2.83068299,
    3: 3.89722947,
    4: 5.02864014,
    5: 6.20476633,
    6: 7.41312621,
    7: 8.64561998,
    8: 9.89675977,
    9: 11.16268502,
}
FAMILIES = ("auto", "gauss", "laplace")


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = ends_of(x)
    low, high = reduce_max(torch.stack([-low, high]).to(torch.float64))
    return -low, high


@OBSERVERS.register("meanstd")
class MeanStdObserver(RangeObserver):
    """The range of the mean plus and minus `k` standard deviations, never beyond the data (docs/algorithms.md C8).

    `momentum` averages over batches; ranks of torch.distributed agree on the moments of their joined batch.

    >>> observer = MeanStdObserver(k=2.0)
    >>> observer.observe_batch(torch.tensor([-1.0, 0.0, 1.0, 8.0]))
    >>> [round(float(end), 3) for end in observer.get_ranges()]
    [-1.0, 8.0]
    """

    def __init__(
        self, k: float = 3.0, momentum: float = 0.0, axis: int | None = None, nonfinite: str = "raise"
    ) -> None:
        if not k > 0.0:
            raise ConfigError(f"k must be a number > 0, got {k!r}")
        super().__init__(momentum, axis, nonfinite)
        self.k = k

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        low, high = _extremes(x)
        mean, deviation = row_moments(x, ranks())
        mean = mean.clamp(low, high)  # sums round, so that the mean of a constant may lie beyond it
        ends = torch.maximum(low, mean - self.k * deviation), torch.minimum(high, mean + self.k * deviation)
        return tuple(end if self.axis is not None else end.squeeze(0) for end in ends)


@OBSERVERS.register("aciq")
class ACIQObserver(RangeObserver):
    """The analytic clip for a Gaussian or a Laplace distribution of the data's size (Banner 2019, arXiv:1810.05723).

    `n_bits` 1..8. `family`: "gauss" and "laplace" are the published formulas; "auto" takes the one of their clips, or
    none, with the least modelled error on the data themselves: that of the clipped part, and step**2 / 12 for elements
    other than 0. Data that never go below 0 are treated as the output of a ReLU: range [0, clip], clip of one bit more
    from the moments of x > 0. The range never goes beyond the data. Deviations: the constants are recomputed and agree
    with the published ones after rounding (docs/algorithms.md C7, H7); C7 chooses the family by the kurtosis, which
    says nothing about other data, such as the outputs of a sigmoid. `momentum` averages over batches; ranks average
    their moments.

    >>> observer = ACIQObserver(4, family="gauss")
    >>> observer.observe_batch(torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(1e-5, 1 - 1e-5, 20001)))
    >>> [round(float(end), 2) for end in observer.get_ranges()]
    [-2.56, 2.56]
    """

    def __init__(
        self,
        n_bits: int,
        family: str = "auto",
        momentum: float = 0.0,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if n_bits + 1 not in ACIQ_GAUSS or n_bits < 1:
            raise ConfigError(f"n_bits must be a whole number from 1 to 8, got {n_bits!r}")
        if family not in FAMILIES:
            raise ConfigError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
        super().__init__(momentum, axis, nonfinite)
        self.n_bits = n_bits
        self.family = family

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        x = x.to(torch.float32) if x.dtype in HALF_TYPES else x
        low, high = _extremes(x)
        is_relu = low >= 0
        mean, nonzero = wide_means(x, ranks())
        # For the output of a ReLU, the moments of the positive part about 0 are those of the whole bell around 0.
        centre = torch.where(is_relu, torch.zeros_like(low), mean)
        square, spread, positive = distances(x, centre, ranks())
        share = torch.where(is_relu, positive, torch.ones_like(positive)).clamp_min(1e-12)
        clips = {
            "gauss": (square / share).sqrt() * self._constant(ACIQ_GAUSS, is_relu),
            "laplace": spread / share * self._constant(ACIQ_LAPLACE, is_relu),
        }
        ranges = {
            family: (torch.maximum(low, centre - clip), torch.minimum(high, centre + clip))
            for family, clip in clips.items()
        }
        ends = ranges.get(self.family) or self._best(x, nonzero, [(low, high), *ranges.values()])
        return tuple(end if self.axis is not None else end.squeeze(0) for end in ends)

    def _best(self, x: Tensor, nonzero: Tensor, ranges: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Choose the range, (C,) ends each, with the least modelled error on rows (C, n); the first of equals.

        nonzero: the share of elements other than 0.
        """
        low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        step = (high.clamp_min(0.0) - low.clamp_max(0.0)) / 2**self.n_bits
        errors = cut_off(x, low, high, ranks()) + nonzero * step.square() / 12
        best = errors.argmin(0, keepdim=True)
        return low.gather(0, best).squeeze(0), high.gather(0, best).squeeze(0)

    def _constant(self, table: dict[int, float], is_relu: Tensor) -> Tensor:
        return torch.where(is_relu, table[self.n_bits + 1], table[self.n_bits]).to(torch.float64)
