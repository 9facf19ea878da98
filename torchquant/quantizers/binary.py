"""Binary quantizer: the sign, with or without a scale. Maths: quantizers_functional/binary.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._row_statistics import row_sums, unit_rows, usable_scale
from torchquant.quantizers_functional.binary import Signs
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("binary")
class BinaryQuantizer(ScaledQuantizer):
    """{-alpha, alpha} by the sign of x, sign(0) = +1. Codes 0 and 1. docs/algorithms.md A8.

    `scale="mean"`: alpha = E|x|, the least-squares scale (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279).
    `"one"`: alpha = 1 (BNN, Courbariaux et al. 2016, arXiv:1602.02830). Takes the gradients of 1-bit formats,
    "hardtanh" and "approxsign", too. A tensor of zeros gives zeros. Raises ConfigError.

    >>> quantizer = BinaryQuantizer()
    >>> quantizer.pre_observe(torch.tensor([-1.0, 0.5, 0.0]))
    >>> quantizer(torch.tensor([-1.0, 0.5, 0.0]))
    tensor([-0.5000,  0.5000,  0.5000])
    """

    n_bits = 1
    code_range = Signs.code_range
    statistics = ("alpha",)
    own_rule = ("scale", "mean")
    traits = frozenset({"sign"})
    presets = {"xnor": {"scale": "mean"}, "bnn": {"scale": "one"}}
    about = About("alpha * sign(x), alpha = E|x| or 1", "arXiv:1603.05279 (XNOR), arXiv:1602.02830 (BNN)", "1")

    def __init__(
        self,
        scale: str = "mean",
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        if scale not in ("mean", "one"):
            raise ConfigError(f"scale must be 'mean' (XNOR) or 'one' (BNN), got {scale!r}")
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.scale = scale

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        units, unit = unit_rows(rows(x, self.axis))
        alpha = usable_scale(reduce_mean(row_sums(units.abs_()) / units.shape[1] * unit), 1.0)
        if self.scale == "one":  # 0 for zeros; NaN and Inf are passed on for the tracker to refuse
            alpha = torch.where(alpha.isfinite(), (alpha > 0).to(alpha.dtype), alpha)
        return (alpha if self.axis is not None else alpha.squeeze(0),)

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        (scale,) = numbers
        return Signs(scale, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[BinaryQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls("mean", axis), cls("mean", axis, gradient_clip=True)]
