"""A sign with a learned threshold. docs/algorithms.md B19."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.binary import Signs, binary_codes
from torchquant.quantizers_functional.formats import Number
from torchquant.quantizers_functional.uniform import like


@dataclass(frozen=True, eq=False)
class ThresholdSigns(Signs):
    """{-scale, scale}: the sign of x - threshold. Codes 0 and 1; the levels stay around 0."""

    threshold: Number

    def codes(self, x: Tensor) -> Tensor:
        return binary_codes(x - self.shaped(self.threshold, x))

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        return super().nearest(x - self.shaped(self.threshold, x), want_inside)

    def thresholds(self) -> Tensor:
        return torch.as_tensor(self.threshold)[..., None]

    def preimage(self, values: Tensor) -> Tensor:
        return values + self.shaped(self.threshold, values)


class _MovedSign(torch.autograd.Function):
    """Computes `scale sign(x - threshold)`; backward takes the slope `max(0, 2 - 2 |x - threshold|)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.gradient_scale = gradient_scale
        return ThresholdSigns(scale, threshold).project(x)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, threshold = ctx.saved_tensors
        passed = grad * (2.0 - 2.0 * (x - threshold).abs()).clamp_min_(0.0)
        for_threshold = None
        if ctx.needs_input_grad[1]:
            for_threshold = -passed.sum_to_size(threshold.shape) * ctx.gradient_scale
        return passed if ctx.needs_input_grad[0] else None, for_threshold, None, None


@explained
def rsign_quantize(x: Tensor, threshold: Tensor, scale: Tensor | float = 1.0, gradient_scale: float = 1.0) -> Tensor:
    """Quantize x to `scale` where x >= threshold, else `-scale`.

    x: (*) float. threshold: () or broadcastable to x, same unit as x. Returns (*). Gradient of x: the slope
    `max(0, 2 - 2 |x - threshold|)`; of the threshold: minus that, summed over its elements, times `gradient_scale`.
    Source: Liu et al. 2020, ReActNet, arXiv:2003.03488, eq. 2-3, with the slope of Bi-Real Net, arXiv:1808.00278.

    >>> rsign_quantize(torch.tensor([-1.0, 0.1, 0.2]), torch.tensor(0.15))
    tensor([-1., -1.,  1.])
    """
    real = x.to(compute_dtype(x))
    value = _MovedSign.apply(real, like(threshold, real), like(scale, real), gradient_scale)
    return cast_back(cast(Tensor, value), x.dtype)
