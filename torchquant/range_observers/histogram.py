"""Observers that keep a histogram of all they have seen and choose the range from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._range_search import best_range
from torchquant.quantizers_functional.affine import affine_params, check_affine, quantize_uniform
from torchquant.range_observers._base import OBSERVERS, RangeObserver
from torchquant.range_observers._distributed import reduce_max, reduce_sum
from torchquant.range_observers._histogram import bin_edges, entropy_bins, histogram, quantile, rebinned, widened
from torchquant.range_observers._statistics import rows


@OBSERVERS.register("histogram")
class HistogramObserver(RangeObserver):
    """Range that holds `percentile` percent of everything seen, half of the rest cut off at each end.

    `n_bins` equal bins over the range seen so far; a batch beyond it extends the range and the old counts are
    spread over the new bins. `decay`: what the old counts are worth when a batch comes: 1 keeps everything
    (activations), 0 the last batch only (weights). Ranks of torch.distributed add their counts.
    Source: docs/algorithms.md C3, C4.

    >>> observer = HistogramObserver(percentile=98.0, decay=1.0)
    >>> for batch in torch.linspace(-1, 1, 10000).split(2500):
    ...     observer.observe_batch(batch)
    >>> [round(float(end), 2) for end in observer.get_ranges()]
    [-0.98, 0.98]
    """

    statistics: tuple[str, ...] = ("range_min", "range_max", "histogram_min", "histogram_max", "counts")
    of_magnitude = False
    """Whether the bins count |x|, from 0 on."""
    histogram_min: Tensor
    histogram_max: Tensor
    counts: Tensor

    def __init__(
        self,
        percentile: float = 99.99,
        n_bins: int = 2048,
        decay: float = 0.0,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if not 50.0 < percentile <= 100.0:
            raise ConfigError(f"percentile must be above 50 and at most 100, got {percentile!r}")
        if not (isinstance(n_bins, int) and n_bins >= 16):
            raise ConfigError(f"n_bins must be a whole number from 16, got {n_bins!r}")
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay must be from 0 to 1, got {decay!r}")
        self.widths = {"counts": n_bins}
        super().__init__(0.0, axis, nonfinite)
        self.counts = self.counts.to(torch.float64)
        self.percentile = percentile
        self.n_bins = n_bins
        self.decay = decay

    @property
    def is_memoryless(self) -> bool:
        return self.decay == 0.0 and self.n_calls == 1

    def _take_in(
        self, values: Sequence[Tensor | float], x: Tensor, seen: Tensor | float, usable: Tensor | float
    ) -> None:
        """Take the numbers as they are: the calls of a batch are joined in the counts."""
        self._average_in(values, seen, usable)
        self._next_call()

    def _kept(self) -> float | Tensor:
        """What the old counts are worth now: all of it where they are of the same batch."""
        if self.n_calls == 1:
            return self.decay
        return torch.where(cast(Tensor, self._buffers["calls_taken"]) == 0, self.decay, 1.0)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        low, high = reduce_max(torch.stack([-x.amin(1), x.amax(1)]).to(torch.float64))
        low, data = -low, x.abs() if self.of_magnitude else x
        keeps = self.is_observed and (self.decay > 0.0 or self.n_calls > 1)
        if keeps:
            # Where no rank has elements there is no new batch.
            kept = torch.where(low > high, 1.0, torch.as_tensor(self._kept(), dtype=low.dtype, device=low.device))
            is_known = kept > 0.0
            seen_low, seen_high, counts = (
                (statistic if self.axis is not None else statistic[None]).to(torch.float64)
                for statistic in (self.histogram_min, self.histogram_max, self.counts)
            )
            low = torch.where(is_known, torch.minimum(low, seen_low), low)
            high = torch.where(is_known, torch.maximum(high, seen_high), high)
        ends = self._ends(low, high)
        new = reduce_sum(histogram(data, *ends, self.n_bins))
        if keeps:
            new = new + kept[:, None] * rebinned(counts, *self._ends(seen_low, seen_high), *ends)
        chosen_low, chosen_high = self.choose(new, *ends)
        found = (*self.bounded(chosen_low, chosen_high, low, high), low, high, new)
        return found if self.axis is not None else tuple(statistic.squeeze(0) for statistic in found)

    def _ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """First and last edge of the bins over a range seen."""
        limit = torch.finfo(torch.float32).max
        low, high = (end.nan_to_num(0.0).clamp(-limit, limit) for end in (low, high))
        if self.of_magnitude:
            return torch.zeros_like(low), widened(torch.zeros_like(low), torch.maximum(-low, high))[1]
        return widened(low, high)

    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range, from counts (C, n_bins) in equal bins from low (C,) to high (C,). Two (C,)."""
        cut = (100.0 - self.percentile) / 200.0
        return quantile(counts, low, high, cut), quantile(counts, low, high, 1.0 - cut)

    def bounded(self, chosen_low: Tensor, chosen_high: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen range as it is handed out, low and high being the ends of all that was seen: not beyond those."""
        return torch.clamp(chosen_low, low, high), torch.clamp(chosen_high, low, high)

    def force_ranges(self, range_min: Tensor | float, range_max: Tensor | float) -> None:
        """Set the range by hand and forget the counts; later batches start a new histogram from there."""
        low = torch.as_tensor(range_min, dtype=torch.float64)
        high = torch.as_tensor(range_max, dtype=torch.float64)
        if bool((low > high).any()):
            raise ConfigError(f"range_min must not exceed range_max, got {range_min} and {range_max}")
        self.force(low, high, low, high, torch.zeros(*low.shape, self.n_bins, dtype=torch.float64))


@OBSERVERS.register("mse")
class MSEObserver(HistogramObserver):
    """The range whose affine grid has the least error on everything seen, over a histogram.

    `n_bits`, `symmetric`: the grid, as in `affine_params`. The observed range is shrunk in 100 steps, both ends by
    the same factor, and the best kept. `power` 2 is the squared error; 2.4 that of BRECQ. docs/algorithms.md C5.

    >>> observer = MSEObserver(4, symmetric="narrow")
    >>> observer.observe_batch(torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(1e-4, 1 - 1e-4, 5000)))
    >>> 2.3 < observer.get_ranges()[1] < 2.6
    tensor(True)
    """

    def __init__(
        self,
        n_bits: int,
        symmetric: bool | str = False,
        power: float = 2.0,
        n_bins: int = 2048,
        decay: float = 0.0,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        check_affine(n_bits, symmetric)
        if not power > 0.0:
            raise ConfigError(f"power must be a number > 0, got {power!r}")
        super().__init__(100.0, n_bins, decay, axis, nonfinite)
        self.n_bits = n_bits
        self.symmetric = symmetric
        self.power = power

    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        edges = bin_edges(low, high, self.n_bins)
        centres = (edges[:, 1:] + edges[:, :-1]) / 2

        def quantize(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
            return quantize_uniform(values, affine_params(low, high, self.n_bits, self.symmetric))

        return best_range(centres, counts, low, high, quantize, power=self.power)


@OBSERVERS.register("entropy")
class EntropyObserver(HistogramObserver):
    """The clip of least information lost, on a histogram of magnitudes (TensorRT 2017; docs/algorithms.md C6).

    `n_bits`: 2**(n_bits - 1) levels are compared. For symmetric grids; of data that never goes below 0 the range is
    [0, clip]. Deviation: the clip is the edge of the last bin kept, the slides add half a bin.

    >>> observer = EntropyObserver(8)
    >>> observer.observe_batch(torch.linspace(-1, 1, 4096))
    >>> observer.get_ranges()
    (tensor(-1.), tensor(1.))
    """

    of_magnitude = True

    def __init__(
        self,
        n_bits: int,
        n_bins: int = 2048,
        decay: float = 0.0,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if not (isinstance(n_bits, int) and n_bits >= 2 and n_bits <= n_bins.bit_length()):
            raise ConfigError(
                f"n_bits must be a whole number from 2 with 2**(n_bits - 1) <= {n_bins} bins, got {n_bits!r}"
            )
        super().__init__(100.0, n_bins, decay, axis, nonfinite)
        self.n_bits = n_bits

    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        kept, _ = entropy_bins(counts, 2 ** (self.n_bits - 1))
        clip = high * kept / self.n_bins
        return -clip, clip

    def bounded(self, chosen_low: Tensor, chosen_high: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends alike, and one end 0 where nothing is on that side of it; NaN stays."""
        zero = torch.zeros_like(low)
        lower, upper = torch.where(low >= 0, zero, chosen_low), torch.where(high <= 0, zero, chosen_high)
        return torch.where(low.isnan(), low, lower), torch.where(high.isnan(), high, upper)
