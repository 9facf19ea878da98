"""NF4 quantizer. Maths: quantizers_functional/nf4.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._row_statistics import usable_scale
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.nf4 import NormalFloat
from torchquant.range_observers._distributed import reduce_max
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("nf4")
class NF4Quantizer(ScaledQuantizer):
    """4-bit NormalFloat: 16 levels at the quantiles of a Gaussian, scaled by the largest magnitude.

    Meant for groups of 64: "nf4/group=64". Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314;
    docs/algorithms.md A10.

    >>> quantizer = NF4Quantizer()
    >>> quantizer.pre_observe(torch.tensor([-2.0, 0.02, 1.0]))
    >>> quantizer(torch.tensor([-2.0, 0.02, 1.0]))
    tensor([-2.0000,  0.0000,  0.8814])
    """

    n_bits = 4
    code_range = NormalFloat.code_range
    statistics = ("absmax",)
    joined_by = {"absmax": "max"}
    scale_of_zeros = 1.0
    about = About("absmax * nearest of 16 Gaussian quantiles", "Dettmers et al. 2023, QLoRA, arXiv:2305.14314", "4")

    def __init__(
        self,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(momentum, axis, gradient_clip, nonfinite)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        absmax = usable_scale(reduce_max(rows(x, self.axis).abs().amax(1)).to(torch.float64), 1.0)
        absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
        return (absmax if self.axis is not None else absmax.squeeze(0),)

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        (scale,) = numbers
        return NormalFloat(scale, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[NF4Quantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(axis, gradient_clip=True), cls(axis)]
