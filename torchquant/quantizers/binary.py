"""Binary quantizer: the sign, with or without a scale. Maths: quantizers_functional/binary.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional._row_statistics import row_mean_magnitudes, usable_scale
from torchquant.quantizers_functional.binary import DrawnSigns, Signs
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("binary")
class BinaryQuantizer(ScaledQuantizer):
    """{-alpha, alpha} by the sign of x, sign(0) = +1. Codes 0 and 1. docs/algorithms.md A8.

    `scale="mean"`: alpha = E|x|, the least-squares scale (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279).
    `"one"`: alpha = 1 (BNN, Courbariaux et al. 2016, arXiv:1602.02830). Takes the gradients of 1-bit formats,
    "hardtanh", "approxsign" and "ede", too. A tensor of zeros gives zeros. `stochastic`, for alpha = 1: in training
    the sign is drawn, +1 with probability `clamp((x + 1) / 2, 0, 1)` (BinaryConnect, Courbariaux et al. 2015,
    arXiv:1511.00363); `torch.manual_seed` repeats it. Raises ConfigError.

    >>> quantizer = BinaryQuantizer()
    >>> quantizer.pre_observe(torch.tensor([-1.0, 0.5, 0.0]))
    >>> quantizer(torch.tensor([-1.0, 0.5, 0.0]))
    tensor([-0.5000,  0.5000,  0.5000])
    """

    n_bits = 1
    code_range = Signs.code_range
    statistics = ("alpha",)
    fuses_clamp = True
    stochastic = False
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
        stochastic: bool = False,
    ) -> None:
        if scale not in ("mean", "one"):
            raise ConfigError(f"scale must be 'mean' (XNOR) or 'one' (BNN), got {scale!r}")
        if stochastic and scale != "one":
            raise ConfigError(f"stochastic draws -1 or 1; give scale='one' with it (bnn,stochastic), got {scale!r}")
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.scale = scale
        self.stochastic = stochastic

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        alpha = usable_scale(row_mean_magnitudes(rows(x, self.axis), ranks()), 1.0)
        if self.scale == "one":  # 0 for zeros; NaN and Inf are passed on for the tracker to refuse
            alpha = torch.where(alpha.isfinite(), (alpha > 0).to(alpha.dtype), alpha)
        return (alpha if self.axis is not None else alpha.squeeze(0),)

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        (scale,) = numbers
        return Signs(scale, axis=self.axis)

    def quantize(self, x: Tensor, clamp: Clamp | None = None) -> Tensor:
        if not (self.stochastic and self.training):
            return super().quantize(x, clamp)
        (scale,) = self.grid()
        return DrawnSigns(scale, axis=self.axis).quantize(x, self.gradient, clamp)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[BinaryQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls("mean", axis), cls("mean", axis, gradient_clip=True)]
