"""One bit: +-alpha by the sign, sign(0) = +1. docs/algorithms.md A8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection
from torchquant.quantizers_functional.formats import KernelCall, ScaledFormat


def binary_codes(x: Tensor) -> Tensor:
    """Return 1 where x >= 0, else 0, in x's type; NaN stays NaN."""
    return x.clamp(0.0, 0.0).add_(x.ge(0.0).to(x.dtype))


@dataclass(frozen=True, eq=False)
class Signs(ScaledFormat):
    """{-scale, scale} by the sign. Codes 0 and 1."""

    code_range = (0, 1)

    def kernel(self) -> KernelCall | None:
        return "signs", (self.scale,), ()

    def codes(self, x: Tensor) -> Tensor:
        return binary_codes(x)

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype) * 2.0 - 1.0

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; x counts as clipped half a level beyond the last one, |x| > 1.5 scale."""
        scale = self.shaped(self.scale, x)
        value = binary_codes(x).mul_(2.0).sub_(1.0).mul_(scale)
        return value, x.abs().le_(1.5 * scale) if want_inside else None


@dataclass(frozen=True, eq=False)
class DrawnSigns(Signs):
    """{-scale, scale}, scale with probability `clamp((x + 1) / 2, 0, 1)`; codes are those of the sign."""

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Draw a level for each element, with torch's generator of the device; x counts as clipped as in `Signs`."""
        chance = (x * 0.5 + 0.5).clamp_(0.0, 1.0)
        value, inside = super().nearest(chance - torch.rand_like(chance), want_inside)
        return value, inside if inside is None else super().nearest(x, True)[1]


@explained
def binary_quantize(
    x: Tensor, alpha: Tensor | float, gradient: str | Gradient = "ste", clamp: Clamp | None = None
) -> Tensor:
    """Quantize x to `alpha` where x >= 0, else `-alpha`.

    x: (*) float. alpha: () or broadcastable to x, >= 0, same unit as x. Returns (*).
    Source: Courbariaux et al. 2016, arXiv:1602.02830 (alpha 1); Rastegari et al. 2016, arXiv:1603.05279 (alpha E|x|).

    >>> binary_quantize(torch.tensor([-0.3, 0.0, 2.0]), 0.5)
    tensor([-0.5000,  0.5000,  0.5000])
    """
    return apply_projection(x, Signs(alpha).project, gradient, clamp)
