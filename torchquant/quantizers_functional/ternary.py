"""Ternary quantization: {-alpha, 0, +alpha}, with alpha and the threshold fitted to the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._arguments import explained
from torchquant._tensors import like, per_channel_view
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, apply_projection
from torchquant.quantizers_functional._levels import beyond_threshold
from torchquant.quantizers_functional._row_statistics import WHOLE, Joining, row_sums, row_sums_by_kernel, unit_rows
from torchquant.quantizers_functional.formats import KernelCall, Number, ScaledFormat

METHODS = ("twn", "exact")


def ternary_codes(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Return `sign(x)` where |x| > threshold (strictly), else 0, in x's type. NaN stays NaN."""
    zero_or_nan = x.clamp(0.0, 1.0).mul_(0.0)
    return x.abs().gt_(like(threshold, x)).mul_(x.sign()).add_(zero_or_nan)


@dataclass(frozen=True, eq=False)
class Ternary(ScaledFormat):
    """{-scale, 0, scale}: the sign where |x| > threshold. Codes -1, 0, 1."""

    threshold: Number

    code_range = (-1, 1)

    def kernel(self) -> KernelCall | None:
        return "ternary", (self.scale, self.threshold), ()

    def codes(self, x: Tensor) -> Tensor:
        return ternary_codes(x, self.shaped(self.threshold, x))

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; x counts as clipped half a level beyond the last one, |x| > 1.5 scale."""
        scale = self.shaped(self.scale, x)
        return self.codes(x).mul_(scale), x.abs().le_(1.5 * scale) if want_inside else None

    def preimage(self, values: Tensor) -> Tensor:
        return beyond_threshold(values, per_channel_view(self.threshold, values.ndim, self.axis))

    def thresholds(self) -> Tensor:
        threshold = torch.as_tensor(self.threshold)
        return torch.stack([-threshold, threshold], -1)


@explained
def ternary_quantize(
    x: Tensor,
    threshold: Tensor | float,
    alpha: Tensor | float,
    gradient: str = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to `alpha * sign(x)` where |x| > threshold, else 0.

    x: (*) float. threshold, alpha: () or broadcastable to x, >= 0, same unit as x. Returns (*).
    Source: Li et al. 2016, arXiv:1605.04711, as in docs/algorithms.md A7. `gradient="clipped"` (ours; the
    paper uses the plain straight-through) stops the gradient where |x| > 1.5 alpha, half a level
    beyond the last one.

    >>> ternary_quantize(torch.tensor([-1.2, 0.2, 0.6]), 0.4, 0.9)
    tensor([-0.9000,  0.0000,  0.9000])
    """
    return apply_projection(x, Ternary(alpha, threshold).project, gradient, clamp)


@explained
def ternary_params(rows: Tensor, method: str = "twn", parts: Joining = WHOLE) -> tuple[Tensor, Tensor]:
    """Find threshold and alpha of each row. rows: (C, n) float, n > 0. Returns two (C,) float64.

    `parts`: how the sums of "twn" over parts of the rows are joined; "exact" takes whole rows.

    `"twn"`: threshold = 0.7 E|x|, alpha = mean of |x| above it (0 if none is).
    `"exact"`: the pair that minimises the squared error, by sorting |x| and maximising
    `(sum of the k largest)**2 / k` over k; O(n log n).

    Source: docs/algorithms.md A7. A channel alone gives the same numbers, bit for bit.

    >>> [round(p.item(), 4) for p in ternary_params(torch.tensor([[-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]]))]
    [0.4667, 0.925]
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "twn" and parts is WHOLE:
        sums = row_sums_by_kernel("magnitude_sums", rows)
        above_sums = None if sums is None else kernels.find("sums_above", rows)
        if sums is not None and above_sums is not None:
            threshold = 0.7 * sums[0] / rows.shape[1]
            total, count = above_sums(rows, threshold)
            return threshold, total / count.clamp_min(1.0)
    units, unit = unit_rows(rows, parts)
    magnitude = units.abs_()
    if method == "twn":
        threshold = parts.mean(0.7 * row_sums(magnitude) / rows.shape[1])
        above = magnitude.clone().gt_(threshold[:, None].to(magnitude.dtype))
        total, count = parts.sum(torch.stack([row_sums(magnitude.mul_(above)), row_sums(above)]))
        return threshold * unit, total / count.clamp_min(1.0) * unit
    largest = magnitude.to(torch.float64).sort(1, descending=True).values
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)
    sums = largest.cumsum(1)
    best = (sums.square() / count).argmax(1, keepdim=True)
    smallest_kept = largest.gather(1, best)
    padded = torch.cat([largest, torch.zeros_like(largest[:, :1])], 1)
    largest_dropped = padded.gather(1, best + 1)
    alpha = (sums.gather(1, best) / (best + 1)).squeeze(1)
    return ((smallest_kept + largest_dropped) / 2).squeeze(1) * unit, alpha * unit
