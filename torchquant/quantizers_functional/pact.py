"""Parameterized clipping activation: a learned upper end. docs/algorithms.md B4."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.uniform import integer_codes, like


class _Clipped(torch.autograd.Function):
    """Computes `step * round(clamp(x, 0, alpha) / step)`; the gradient goes to x inside and to alpha above it.

    `calibrated`: alpha also gets the rounding error inside, in units of alpha.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, n_steps: int, calibrated: bool) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.n_steps = n_steps if calibrated else None
        step = alpha / n_steps
        return torch.div(x, step).clamp_(0, n_steps).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, alpha = ctx.saved_tensors
        above = x.ge(alpha).to(grad.dtype)
        for_alpha = None
        if ctx.needs_input_grad[1]:
            moved = above
            if ctx.n_steps is not None:
                unit = (x / alpha).clamp(0.0, 1.0)
                moved = above + torch.round(unit * ctx.n_steps) / ctx.n_steps - unit
            for_alpha = (grad * moved).sum_to_size(alpha.shape)
        for_x = grad * x.ge(0.0).to(grad.dtype).sub_(above) if ctx.needs_input_grad[0] else None
        return for_x, for_alpha, None, None


@explained
def pact_quantize(x: Tensor, alpha: Tensor, n_bits: int, calibrated: bool = False) -> Tensor:
    """Quantize `clamp(x, 0, alpha)` to `2**n_bits` levels, 0 and alpha among them.

    x: (*) float. alpha: () or broadcastable to x, > 0, same unit as x. Returns (*). Gradient of x: 1 where
    0 <= x < alpha; of alpha: 1 where x >= alpha, and if `calibrated` the rounding error over alpha below it.
    Source: Choi et al. 2018, arXiv:1805.06085; calibrated: Jin et al. 2019, SAT, arXiv:1912.10207, eq. 12.

    >>> alpha = torch.tensor(6.0, requires_grad=True)
    >>> y = pact_quantize(torch.tensor([-1.0, 2.1, 7.0, 9.0]), alpha, 2)
    >>> y
    tensor([0., 2., 6., 6.], grad_fn=<_ClippedBackward>)
    >>> y.sum().backward()
    >>> alpha.grad
    tensor(2.)
    """
    real = x.to(compute_dtype(x))
    value = _Clipped.apply(real, like(alpha, real), integer_codes(n_bits, False)[1], calibrated)
    return cast_back(cast(Tensor, value), x.dtype)
