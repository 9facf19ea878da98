"""Parameterized clipping activation: a learned upper end. docs/algorithms.md B4."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._arguments import explained
from torchquant._tensors import divided, in_layout_of
from torchquant.quantizers_functional._bits import is_channels_last, unpack_mask
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.uniform import integer_codes, like


class _Clipped(torch.autograd.Function):
    """Computes `step * round(clamp(x, 0, alpha) / step)`; the gradient goes to x inside and to alpha above it.

    A kernel keeps two bits an element for backward, of where these are; PyTorch keeps x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, n_steps: int) -> Tensor:
        ctx.channels_last = is_channels_last(x)
        step = alpha / n_steps
        kernel = kernels.find("clip", x)
        found = None if kernel is None else kernel(x, step, alpha, n_steps)
        value, *kept = (_value(x, step, n_steps), x) if found is None else found
        ctx.save_for_backward(alpha, *kept)
        return cast(Tensor, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        alpha, *kept = ctx.saved_tensors
        wants_x, wants_alpha, _ = ctx.needs_input_grad
        grad = grads[0].contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format)
        if len(kept) == 1:
            inside, above = _masks(kept[0], alpha)
        else:
            kernel = kernels.find_backward("clip_backward", grad, grad)
            found = None if kernel is None else kernel(grad, *kept, alpha, (wants_x, wants_alpha))
            if found is not None:
                return *found, None
            inside, above = (unpack_mask(bits, grad.shape, grad.dtype, ctx.channels_last) for bits in kept)
        for_alpha = (grad * above).sum_to_size(alpha.shape) if wants_alpha else None
        return grad * inside if wants_x else None, for_alpha, None


class _Calibrated(torch.autograd.Function):
    """As `_Clipped`, but alpha also gets the rounding error inside, in units of alpha; x is kept to compute it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, n_steps: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.n_steps = n_steps
        step = alpha / n_steps
        kernel = kernels.find("learned_step", x)
        value = None if kernel is None else kernel(x, step, 0, n_steps)
        return _value(x, step, n_steps) if value is None else cast(Tensor, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, alpha = ctx.saved_tensors
        wants_x, wants_alpha, _ = ctx.needs_input_grad
        grad = in_layout_of(grads[0], x)
        kernel = kernels.find_backward("calibrated_clip_backward", x, grad)
        found = None if kernel is None else kernel(x, grad, alpha, ctx.n_steps, (wants_x, wants_alpha))
        if found is not None:
            return *found, None
        inside, above = _masks(x, alpha)
        for_alpha = None
        if wants_alpha:
            unit = (x / alpha).clamp(0.0, 1.0)
            moved = above + divided(torch.round(unit * ctx.n_steps), ctx.n_steps) - unit
            for_alpha = (grad * moved).sum_to_size(alpha.shape)
        return grad * inside if wants_x else None, for_alpha, None


def _value(x: Tensor, step: Tensor, n_steps: int) -> Tensor:
    return torch.div(x, step).clamp_(0, n_steps).round_().mul_(step)


def _masks(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 where 0 <= x < alpha, and where x >= alpha, in x's type."""
    above = x.ge(alpha).to(x.dtype)
    return x.ge(0.0).to(x.dtype).sub_(above), above


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
    function = _Calibrated if calibrated else _Clipped
    value = function.apply(real, like(alpha, real), integer_codes(n_bits, False)[1])
    return cast_back(cast(Tensor, value), x.dtype)
