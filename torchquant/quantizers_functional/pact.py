"""Parameterized clipping activation: a learned upper end. docs/algorithms.md B4."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.uniform import integer_codes, like


class _Clipped(torch.autograd.Function):
    """Computes `step * round(clamp(x, 0, alpha) / step)`; the gradient goes to x inside and to alpha above it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, n_steps: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        step = alpha / n_steps
        return torch.div(x, step).clamp_(0, n_steps).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, alpha = ctx.saved_tensors
        above = x.ge(alpha).to(grad.dtype)
        for_alpha = (grad * above).sum_to_size(alpha.shape) if ctx.needs_input_grad[1] else None
        for_x = grad * x.ge(0.0).to(grad.dtype).sub_(above) if ctx.needs_input_grad[0] else None
        return for_x, for_alpha, None


@explained
def pact_quantize(x: Tensor, alpha: Tensor, n_bits: int) -> Tensor:
    """Quantize `clamp(x, 0, alpha)` to `2**n_bits` levels, 0 and alpha among them.

    x: (*) float. alpha: () or broadcastable to x, > 0, same unit as x. Returns (*). Gradient of x: 1 where
    0 <= x < alpha; of alpha: 1 where x >= alpha. Source: Choi et al. 2018, arXiv:1805.06085.

    >>> alpha = torch.tensor(6.0, requires_grad=True)
    >>> y = pact_quantize(torch.tensor([-1.0, 2.1, 7.0, 9.0]), alpha, 2)
    >>> y
    tensor([0., 2., 6., 6.], grad_fn=<_ClippedBackward>)
    >>> y.sum().backward()
    >>> alpha.grad
    tensor(2.)
    """
    real = x.to(compute_dtype(x))
    return cast_back(cast(Tensor, _Clipped.apply(real, like(alpha, real), integer_codes(n_bits, False)[1])), x.dtype)
