"""Trained quantization thresholds: a step that is a learned power of two. docs/algorithms.md B10."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._arguments import explained
from torchquant._tensors import in_layout_of
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._powers import pow2
from torchquant.quantizers_functional.uniform import integer_codes, like


class _PowerOfTwoStep(torch.autograd.Function):
    """Computes `2**(ceil(log2_t) - bits)`; the gradient passes straight through the ceil."""

    @staticmethod
    def forward(ctx: Any, log2_t: Tensor, bits: int) -> Tensor:
        step = pow2(log2_t.ceil().to(torch.int64) - bits, log2_t.dtype)
        ctx.save_for_backward(step)
        return step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (step,) = ctx.saved_tensors
        return grads[0] * step * math.log(2.0), None


class _TrainedThreshold(torch.autograd.Function):
    """Computes `step * clamp(round(x / step))`; the rounded code, not the quotient, decides what is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.codes = (qmin, qmax)
        kernel = kernels.find("uniform", x)
        found = None if kernel is None else kernel(x, step, qmin, qmax)
        return torch.div(x, step).round_().clamp_(qmin, qmax).mul_(step) if found is None else cast(Tensor, found[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, step = ctx.saved_tensors
        grad = in_layout_of(grads[0], x)
        kernel = kernels.find_backward("rounded_step_backward", x, grad)
        arguments = x, grad, step, *ctx.codes, ctx.needs_input_grad[:2]
        found = None if kernel is None else kernel(*arguments)
        return *(_gradients(*arguments) if found is None else found), None, None


def _gradients(
    x: Tensor, grad: Tensor, step: Tensor, qmin: int, qmax: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and step, those that are wanted."""
    scaled = torch.div(x, step)
    rounded = scaled.round()
    ends = (qmin - 0.5, qmax + 0.5)
    for_step = None
    if wanted[1]:
        inside = torch.ops.aten.hardtanh_backward(scaled, rounded, *ends)
        for_step = (grad * rounded.clamp(qmin, qmax).sub_(inside)).sum_to_size(step.shape)
    return torch.ops.aten.hardtanh_backward(grad, rounded, *ends) if wanted[0] else None, for_step


def tqt_step(log2_t: Tensor, n_bits: int, signed: bool = True) -> Tensor:
    """Compute `2**ceil(log2_t) / 2**(n_bits - 1)` (signed) or `/ 2**n_bits`, exactly; differentiable in log2_t."""
    return cast(Tensor, _PowerOfTwoStep.apply(log2_t, n_bits - 1 if signed else n_bits))


@explained
def tqt_quantize(x: Tensor, log2_t: Tensor, n_bits: int, signed: bool = True) -> Tensor:
    """Quantize x on a grid whose step is the power of two that covers the threshold `2**log2_t`.

    x: (*) float. log2_t: () or broadcastable to x, the logarithm of the threshold. Returns (*). Gradient of x: 1 where
    the rounded code is in range. Gradient of log2_t: `step * ln 2 * (round(v) - v)` inside, the end code instead
    outside, v = x / step. Source: Jain et al. 2019, arXiv:1903.08066.

    >>> tqt_quantize(torch.tensor([0.3, 0.011, -1.2, 2.0]), torch.tensor(-0.15), 8)
    tensor([ 0.2969,  0.0078, -1.0000,  0.9922])
    """
    real = x.to(compute_dtype(x))
    codes = integer_codes(n_bits, signed)
    step = tqt_step(like(log2_t, real), n_bits, signed)
    return cast_back(cast(Tensor, _TrainedThreshold.apply(real, step, *codes)), x.dtype)
