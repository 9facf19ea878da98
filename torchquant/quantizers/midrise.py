"""The mid-rise family: uL2Q, VecQ, ClipQ, ZoomQ. Maths: quantizers_functional/midrise.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._midrise import MidriseQuantizer
from torchquant.quantizers_functional._row_statistics import (
    row_mean_squares,
    row_moments,
    usable_scale,
)
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.midrise import MidriseGrid, point_sums
from torchquant.range_observers._distributed import ranks, reduce_max, reduce_mean, reduce_sum
from torchquant.range_observers._statistics import ends_of


def _rms(x: Tensor) -> Tensor:
    return reduce_mean(row_mean_squares(x)).sqrt()


@QUANTIZERS.register("ul2q")
class UL2QQuantizer(MidriseQuantizer):
    """Mid-rise around the mean with the step that is optimal for a Gaussian (Gong et al. 2019, uL2Q).

    Deviation from the published code, which dropped the half step and so was biased (docs/algorithms.md I-11);
    above 8 bits the recomputed steps instead of 6 / (2**n - 1), which stop at 34 dB (I-14).

    >>> quantizer = UL2QQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, 0.2, 1.4]))
    tensor([-1.1579,  0.4748,  1.2912])
    """

    about = About(
        "(floor((x - mean) / step) + 1/2) * step + mean, step = c(n) * std", "Gong et al. 2019, IJCNN", "1..12"
    )

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, deviation = row_moments(x, ranks())
        return self.best_step(deviation), mean


@QUANTIZERS.register("vecq")
class VecQQuantizer(MidriseQuantizer):
    """Thresholds of the optimal Gaussian step, values refitted by least squares (Gong et al. 2020, arXiv:2005.08501).

    Deviation from the AutoQNN code: the refit is `<x, p> / <p, p>`, the least-squares one, not the ratio of norms
    (docs/algorithms.md I-12), held to where every value stays in its own cell: on heavy tails the values would leave
    theirs, and quantizing twice would move them on.

    >>> quantizer = VecQQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, 0.2, 1.4]))
    tensor([-1.2545,  0.4182,  1.2545])
    """

    statistics = ("threshold_step", "step")
    about = About(
        "p * step, p = floor(x / (c(n) * rms)) + 1/2, step = <x, p> / <p, p>",
        "Gong et al. 2020, IEEE TC, arXiv:2005.08501",
        "1..12",
    )

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        threshold_step = self.best_step(_rms(x))
        along, square = reduce_sum(point_sums(x, threshold_step, self.n_bits))
        step = along / square
        step = usable_scale(step, 2.0**self.n_bits)
        return threshold_step, step if self.n_bits == 1 else self._held(step, threshold_step)

    def _held(self, step: Tensor, threshold_step: Tensor) -> Tensor:
        """Return the step nearest to `step` that leaves every value in its cell.

        `(k + 1/2) step` within `(k + 1/2 +- margin) threshold_step`; the outermost cells have no far end. bfloat16
        rounds the last values by up to `2**(n_bits - 9)` cells, which from 8 bits on no margin makes up for.
        """
        half, margin = 2 ** (self.n_bits - 1), max(0.49 - 2.0 ** (self.n_bits - 9), 0.125)
        least, most = 1.0 - margin / (half - 0.5), 1.0 + margin / (half - 1.5)
        held = torch.minimum(torch.maximum(step, least * threshold_step), most * threshold_step)
        return torch.where((step > 0) & (threshold_step > 0), held, step)

    has_shift = False

    def numbers_at(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return scale, scale

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        threshold_step, step = numbers
        return MidriseGrid(step, self.n_bits, threshold_step, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[VecQQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(3, axis, gradient_clip=True), cls(2, axis), cls(1, axis)]


@QUANTIZERS.register("clipq")
class ClipQQuantizer(MidriseQuantizer):
    """Mid-rise around 0, step optimal for a Gaussian, gradient clipped to the cells (AutoQNN, arXiv:2304.03782).

    Deviation from the published code: the clipping limits are those of the tensor being quantized, not of the one
    before it (docs/algorithms.md I-19), and the 1-bit step is the optimal one (I-13).

    >>> quantizer = ClipQQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, 0.2, 1.4]))
    tensor([-1.2286,  0.4095,  1.2286])
    """

    statistics = ("step",)
    about = About(
        "(floor(x / step) + 1/2) * step, step = c(n) * rms", "AutoQNN, Gong et al. 2023, arXiv:2304.03782", "1..12"
    )

    def __init__(
        self,
        n_bits: int,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = True,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(n_bits, axis, momentum, gradient_clip, nonfinite)

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.best_step(_rms(x)),)

    has_shift = False


@QUANTIZERS.register("zoomq")
class ZoomQQuantizer(MidriseQuantizer):
    """2**n_bits equal cells over the range of the data (AutoQNN, arXiv:2304.03782). Real 0 is not on the grid.

    Largest error half a cell; for padded or sparse data prefer a grid that holds 0.

    >>> quantizer = ZoomQQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, 0.2, 1.4]))
    tensor([-0.8750,  0.4250,  1.0750])
    """

    statistics = ("range_min", "range_max")
    joined_by = {"range_min": "min", "range_max": "max"}
    about = About(
        "lo + (floor((x - lo) / step) + 1/2) * step, step = (hi - lo) / 2**n",
        "AutoQNN, Gong et al. 2023, arXiv:2304.03782",
        "1..12",
    )

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        low, high = ends_of(x)
        low, high = reduce_max(torch.stack([-low, high]))
        return -low, high

    def grid(self) -> tuple[Tensor | int, ...]:
        if self._range_observer is not None:
            return super().grid()
        limit = torch.finfo(torch.float32).max / 4
        low, high = (statistic.clamp(-limit, limit) for statistic in self.get())
        step = (high - low) / 2**self.n_bits
        step = torch.where(high > low, step.clamp_min(2.0**-126), torch.zeros_like(step))
        return step, low + step * 2 ** (self.n_bits - 1)
