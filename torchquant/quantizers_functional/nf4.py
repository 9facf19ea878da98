"""NF4: sixteen levels at the quantiles of a Gaussian, between -1 and 1. docs/algorithms.md A10."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant._tensors import constant
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection
from torchquant.quantizers_functional.formats import ScaledFormat

# The published constants (Dettmers et al. 2023, QLoRA, arXiv:2305.14314).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, eq=False)
class NormalFloat(ScaledFormat):
    """The sixteen levels times a scale. A code is the index of a level."""

    code_range = (0, 15)

    def codes(self, x: Tensor) -> Tensor:
        """Count the fifteen midpoints below x, which is exact and needs no search. NaN stays NaN."""
        scaled = x / self.shaped(self.scale, x)
        codes = scaled.clamp(0.0, 0.0)
        for low, high in pairwise(NF4_LEVELS):
            codes += scaled.gt((low + high) / 2).to(x.dtype)
        return codes

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        levels = constant(NF4_LEVELS, dtype, codes.device)
        values = levels[codes.nan_to_num(0.0).to(torch.int64)]
        return values + codes.to(dtype).clamp(0.0, 0.0) if codes.is_floating_point() else values

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; x counts as clipped beyond the largest level, |x| > scale."""
        value = self.values(self.codes(x), x.dtype)
        return value, x.abs().le_(self.shaped(self.scale, x)) if want_inside else None


@explained
def nf4_quantize(
    x: Tensor, absmax: Tensor | float, gradient: str | Gradient = "ste", clamp: Clamp | None = None
) -> Tensor:
    """Quantize x to the nearest of `absmax * NF4_LEVELS`.

    x: (*) float. absmax: () or broadcastable to x, > 0, same unit as x. Returns (*).

    >>> nf4_quantize(torch.tensor([-2.0, 0.01, 0.5]), 1.0)
    tensor([-1.0000,  0.0000,  0.4407])
    """
    return apply_projection(x, NormalFloat(absmax).project, gradient, clamp)
