"""Two levels anywhere: +-alpha around beta, both learned. docs/algorithms.md B18."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.midrise import MidriseGrid
from torchquant.quantizers_functional.uniform import like


def two_levels(alpha: Tensor, beta: Tensor, present: Tensor | float = 1.0, axis: int | None = None) -> MidriseGrid:
    """Return the format {beta - alpha, beta + alpha}; `present` 0 makes both levels 0, for a tensor of zeros."""
    return MidriseGrid(2.0 * alpha * present, 1, 2.0 * alpha, shift=beta * present, axis=axis)


class _TwoLevels(torch.autograd.Function):
    """Computes `alpha sign(u) + beta`, `u = (x - beta) / alpha`; backward takes sign(u) for clamp(u, -1, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, present: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        ctx.gradient_scale = gradient_scale
        return two_levels(alpha, beta, present).project(x)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, alpha, beta = ctx.saved_tensors
        unit = (x - beta) / alpha
        inside = unit.abs().le(1.0).to(grad.dtype)
        for_x = grad * inside if ctx.needs_input_grad[0] else None
        for_alpha = for_beta = None
        if ctx.needs_input_grad[1]:
            sign = unit.ge(0.0).to(grad.dtype) * 2.0 - 1.0
            for_alpha = (grad * (sign - unit * inside)).sum_to_size(alpha.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            for_beta = (grad - grad * inside).sum_to_size(beta.shape) * ctx.gradient_scale
        return for_x, for_alpha, for_beta, None, None


@explained
def adabin_quantize(
    x: Tensor, alpha: Tensor, beta: Tensor, gradient_scale: float = 1.0, present: Tensor | float = 1.0
) -> Tensor:
    """Quantize x to `beta + alpha` where x >= beta, else `beta - alpha`.

    x: (*) float. alpha, beta: () or broadcastable to x, same unit as x; alpha > 0. Returns (*). The gradients are those
    of `alpha clamp(u, -1, 1) + beta` with `u = (x - beta) / alpha`, where the sign in place of the clamp stands in the
    gradient of alpha; those of alpha and beta are summed over the elements that share them, times `gradient_scale`.
    `present`: 0 for a tensor of zeros. Source: Tu et al. 2022, AdaBin, arXiv:2208.08084, eq. 8-10.

    >>> adabin_quantize(torch.tensor([-1.0, 0.1, 2.0]), torch.tensor(0.5), torch.tensor(0.25))
    tensor([-0.2500, -0.2500,  0.7500])
    """
    real = x.to(compute_dtype(x))
    numbers = (like(number, real) for number in (alpha, beta, present))
    return cast_back(cast(Tensor, _TwoLevels.apply(real, *numbers, gradient_scale)), x.dtype)
