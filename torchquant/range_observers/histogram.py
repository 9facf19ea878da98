"""Observers that keep a histogram of all data seen and choose the range from it on demand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional.affine import affine_params, check_affine
from torchquant.quantizers_functional.formats import Format
from torchquant.range_observers._base import OBSERVERS
from torchquant.range_observers._counting import CountingObserver
from torchquant.range_observers._histogram import clip_error, entropy_share, quantile
from torchquant.range_observers._least_error import format_error, histogram_error, least_error_range

STRIDE = 16  # step between the numbers of bins that are tried for the least loss of information
TWO_SIDED = (False, "asymmetric-narrow")  # grids whose ends are independent of one another


@OBSERVERS.register("histogram")
class HistogramObserver(CountingObserver):
    """The range that holds `percentile` percent of all data seen; half of the rest is cut off at each end.

    `n_bins` equal bins over the range seen so far; a batch beyond it extends the range and the old counts are
    spread over the new bins. `decay` is the weight of the old counts when a batch comes: 1 keeps everything
    (activations), 0 the last batch only (weights). Ranks of torch.distributed add their counts.
    Source: docs/algorithms.md C3, C4.

    Batches are only counted; the range is chosen when it is next needed: by `get_ranges`, by a quantizer, by
    `state_dict`, or when a QModule enters a state. With `decay=0` it is chosen at once, and no counts are kept.

    >>> observer = HistogramObserver(percentile=98.0, decay=1.0)
    >>> for batch in torch.linspace(-1, 1, 10000).split(2500):
    ...     observer.observe_batch(batch)
    >>> [round(float(end), 2) for end in observer.get_ranges()]
    [-0.98, 0.98]
    """

    chosen_by = ("percentile",)

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
        super().__init__(n_bins, decay, axis, nonfinite)
        self.percentile = percentile

    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        cut = (100.0 - self.percentile) / 200.0
        ends = self.ends_of_bins(low, high)
        return quantile(counts, *ends, cut), quantile(counts, *ends, 1.0 - cut)


@OBSERVERS.register("mse")
class MSEObserver(CountingObserver):
    """The range whose affine grid has the least error on all data seen, over a histogram.

    `n_bits`, `symmetric`: the grid, as in `affine_params`. The ends of all that was seen are shrunk, each by a factor
    of its own unless the grid is symmetric: first by the powers of 0.6 down to 1/99, then by factors nearer and nearer
    to the best, at last 1 % apart. Elements that are 0 have no error on any grid and are not counted; the mass of a bin
    counts as evenly spread inside it. `power` 2 is the squared error; 2.4 that of BRECQ, taken at the middles of
    bins, as every error is on the format of a quantizer that is not affine; its ends are shrunk alike without a shift.
    docs/algorithms.md C5, whose factors are the same for both ends and hundredths.

    >>> observer = MSEObserver(4, symmetric="narrow")
    >>> observer.observe_batch(torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(1e-4, 1 - 1e-4, 5000)))
    >>> 2.3 < observer.get_ranges()[1] < 2.6
    tensor(True)
    """

    counts_zeros = False
    chosen_by = ("n_bits", "symmetric", "power", "format_over", "shrinks_alike")
    format_over: Callable[[Tensor, Tensor], Format] | None = None
    """(low, high) -> the format over that range; None: an affine grid. A quantizer of another format sets its own."""
    shrinks_alike = True
    """Whether both ends of the range of such a format are shrunk by the same factor."""

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
        super().__init__(n_bins, decay, axis, nonfinite)
        self.n_bits = n_bits
        self.symmetric = symmetric
        self.power = power

    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.format_over is not None:
            errors = format_error(counts, *self.ends_of_bins(low, high), self.format_over, self.power)
            return least_error_range(errors, low, high, self.shrinks_alike)
        errors = histogram_error(counts, *self.ends_of_bins(low, high), self.n_bits, self.symmetric, self.power)
        return least_error_range(errors, low, high, self.symmetric not in TWO_SIDED)


@OBSERVERS.register("entropy")
class EntropyObserver(CountingObserver):
    """The clip that loses least information, on a histogram of magnitudes (TensorRT 2017; docs/algorithms.md C6).

    `n_bits`, `symmetric`: the grid, as in `affine_params`; the levels on the longer side of 0 are compared, all
    2**n_bits of data on one side. Both sides are clipped alike, and neither beyond the data. Deviations, for data that
    the published rule cuts to almost nothing because most of it lies at one value: elements that are 0, as a ReLU
    leaves them, are not counted (NVIDIA's calibrator overwrites the first bin, for the same reason); only clips are
    compared that have no more squared error than no clip, by bins and step**2 / 12. The clip is the edge of the last
    bin kept, the slides add half a bin; every 16th bin is tried.

    >>> observer = EntropyObserver(8)
    >>> observer.observe_batch(torch.linspace(-1, 1, 4096))
    >>> observer.get_ranges()
    (tensor(-1.), tensor(1.))
    """

    of_magnitude = True
    counts_zeros = False
    chosen_by = ("n_bits", "symmetric")
    symmetric: bool | str = False

    def __init__(
        self,
        n_bits: int,
        n_bins: int = 2048,
        decay: float = 0.0,
        axis: int | None = None,
        nonfinite: str = "raise",
        symmetric: bool | str = False,
    ) -> None:
        if not (isinstance(n_bits, int) and n_bits >= 2 and n_bits <= n_bins.bit_length()):
            raise ConfigError(
                f"n_bits must be a whole number from 2 with 2**(n_bits - 1) <= {n_bins} bins, got {n_bits!r}"
            )
        check_affine(n_bits, symmetric)
        super().__init__(n_bins, decay, axis, nonfinite)
        self.n_bits = n_bits
        self.symmetric = symmetric

    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        _, top = self.ends_of_bins(low, high)
        clips = top[:, None] * torch.linspace(0.0, 1.0, self.n_bins + 1, dtype=top.dtype, device=top.device)
        ends = torch.maximum(low[:, None], -clips), torch.minimum(high[:, None], clips)
        params = affine_params(*ends, self.n_bits, self.symmetric)
        error = clip_error(counts, top) + counts.sum(1, keepdim=True) * params.delta.square() / 12
        n_levels = (top / params.delta[:, -1]).round().clamp(1, 2**self.n_bits).to(torch.int64)
        clip = top * entropy_share(counts, n_levels, 2**self.n_bits, error, STRIDE)
        return -clip, clip
