"""Trained ternary quantization: {-negative, 0, positive}, both scales learned. docs/algorithms.md A7."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant._tensors import like, per_channel_view
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._levels import beyond_threshold
from torchquant.quantizers_functional.formats import Format, IntegerTerms


def ttq_codes(x: Tensor, threshold: Tensor) -> Tensor:
    """Return `sign(x)` where |x| > threshold (strictly), else 0, in x's type. NaN stays NaN."""
    return (x.gt(threshold).to(x.dtype) - x.lt(-threshold).to(x.dtype)).add_(x.clamp(0.0, 0.0))


def ttq_values(codes: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return `positive` for 1, `-negative` for -1. codes: (*) float."""
    return codes.clamp_min(0.0) * positive + codes.clamp_max(0.0) * negative


@dataclass(frozen=True, eq=False)
class TernaryPair(Format):
    """{-negative, 0, positive} with one threshold for both signs. Codes -1, 0, 1."""

    threshold: Tensor
    positive: Tensor
    negative: Tensor

    code_range = (-1, 1)

    def codes(self, x: Tensor) -> Tensor:
        return ttq_codes(x, self.shaped(self.threshold, x))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes.to(dtype)
        return ttq_values(codes, self.shaped(self.positive, codes), self.shaped(self.negative, codes))

    def decoding_numbers(self) -> list[Tensor]:
        return [self.positive, self.negative]

    def preimage(self, values: Tensor) -> Tensor:
        return beyond_threshold(values, per_channel_view(self.threshold, values.ndim, self.axis))

    def thresholds(self) -> Tensor:
        return torch.stack([-self.threshold, self.threshold], -1)

    def integer_terms(self) -> IntegerTerms:
        scales = (scale.detach().to(torch.float64).cpu() for scale in (self.positive, self.negative))
        return list(zip(scales, torch.tensor([[0, 0, 1], [-1, 0, 0]]), strict=True))


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold, positive, negative)
        return ttq_values(ttq_codes(x, threshold), positive, negative)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, threshold, positive, negative = ctx.saved_tensors
        above, below = x.gt(threshold).to(grad.dtype), x.lt(-threshold).to(grad.dtype)
        for_positive = (grad * above).sum_to_size(positive.shape) if ctx.needs_input_grad[2] else None
        for_negative = (-grad * below).sum_to_size(negative.shape) if ctx.needs_input_grad[3] else None
        for_x = grad * (1.0 + above * (positive - 1.0) + below * (negative - 1.0)) if ctx.needs_input_grad[0] else None
        return for_x, None, for_positive, for_negative


@explained
def ttq_quantize(x: Tensor, threshold: Tensor | float, positive: Tensor, negative: Tensor) -> Tensor:
    """Quantize x to `positive` where x > threshold, `-negative` where x < -threshold, else 0.

    x: (*) float. threshold, positive, negative: () or broadcastable to x, > 0, same unit as x. Returns (*). Gradient
    of positive: the sum over its elements; of negative: minus the sum over its own (the paper prints it without the
    minus); of x: times positive, 1, negative on the three regions. Source: Zhu et al. 2017, arXiv:1612.01064.

    >>> ttq_quantize(torch.tensor([-1.2, 0.2, 0.6]), 0.4, torch.tensor(0.9), torch.tensor(0.5))
    tensor([-0.5000,  0.0000,  0.9000])
    """
    real = x.to(compute_dtype(x))
    numbers = (like(number, real) for number in (threshold, positive, negative))
    return cast_back(cast(Tensor, _Trained.apply(real, *numbers)), x.dtype)
