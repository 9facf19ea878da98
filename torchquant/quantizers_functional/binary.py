"""One bit: +-alpha by the sign, sign(0) = +1. docs/algorithms.md A8."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import Clamp, Gradient, Projection, apply_projection
from torchquant.quantizers_functional.uniform import like


def binary_codes(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0, in x's type; NaN stays NaN."""
    return x.clamp(0.0, 0.0).add_(x.ge(0.0).to(x.dtype))


def binary_projection(alpha: Tensor | float) -> Projection:
    """Projection on {-alpha, alpha}; `inside` is 1 where |x| <= 1.5 alpha, half a level beyond the last."""

    def project(real: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        scale = like(alpha, real)
        value = binary_codes(real).mul_(2.0).sub_(1.0).mul_(scale)
        return value, real.abs().le_(1.5 * scale) if want_inside else None

    return project


@explained
def binary_quantize(
    x: Tensor, alpha: Tensor | float, gradient: str | Gradient = "ste", clamp: Clamp | None = None
) -> Tensor:
    """Quantize x to `alpha` where x >= 0, else `-alpha`.

    x: (*) float. alpha: () or broadcastable to x, >= 0, same unit as x. Returns (*).
    Source: Courbariaux et al. 2016, arXiv:1602.02830 (alpha 1); Rastegari et al. 2016, arXiv:1603.05279 (alpha E|x|).

    >>> import torch
    >>> binary_quantize(torch.tensor([-0.3, 0.0, 2.0]), 0.5)
    tensor([-0.5000,  0.5000,  0.5000])
    """
    return apply_projection(x, binary_projection(alpha), gradient, clamp)
