"""Stretched elastic quantization: a learned range with levels in the middle of equal cells, or ternary."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.binary import Signs
from torchquant.quantizers_functional.formats import Format, UniformGrid
from torchquant.quantizers_functional.midrise import MidriseGrid
from torchquant.quantizers_functional.uniform import like

CLIP = 0.99
"""Share of alpha beyond which x is clipped: just below the edge, where the rounding would give one code too many."""
MOST_BITS = 7  # at 8 bits the clip would take the last level away


def check_seq(n_bits: int, ternary: bool) -> None:
    """Raise ConfigError unless n_bits is 1..7, and 2 if ternary."""
    if not (isinstance(n_bits, int) and 1 <= n_bits <= MOST_BITS):
        raise ConfigError(f"n_bits must be a whole number from 1 to {MOST_BITS}, got {n_bits!r}")
    if ternary and n_bits != 2:
        raise ConfigError(f"three levels are stored in 2 bits; give n_bits 2 with ternary, got {n_bits}")


def seq_format(
    alpha: Tensor, n_bits: int, ternary: bool = False, present: Tensor | float = 1.0, axis: int | None = None
) -> Format:
    """Return the format with range alpha: +-alpha at 1 bit, {-2/3, 0, 2/3} alpha, or 2**n_bits midpoints of cells.

    `present`: 0 makes every level 0, for a tensor of zeros.
    """
    if ternary:
        return UniformGrid(alpha * 2.0, 0, -1, 1, divisor=3, axis=axis)
    if n_bits == 1:
        return Signs(alpha * present, axis=axis)
    cell = alpha / 2 ** (n_bits - 1)
    return MidriseGrid(cell * present, n_bits, cell, axis=axis)


class _Stretched(torch.autograd.Function):
    """Projects x on `seq_format(alpha)`; LSQ's gradient of alpha, with the level in units of alpha as the code."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, present: Tensor, n_bits: int, ternary: bool, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, present)
        ctx.options = n_bits, ternary, gradient_scale
        return seq_format(alpha, n_bits, ternary, present).project(x)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (grad,) = grads
        x, alpha, present = ctx.saved_tensors
        n_bits, ternary, gradient_scale = ctx.options
        position = x / alpha
        inside = position.abs().le(CLIP).to(grad.dtype)
        for_alpha = None
        if ctx.needs_input_grad[1]:
            level = seq_format(alpha, n_bits, ternary, present).project(x)[0] / alpha
            moved = level if n_bits == 1 else level - position * inside
            for_alpha = (grad * moved).sum_to_size(alpha.shape) * gradient_scale
        return grad * inside if ctx.needs_input_grad[0] else None, for_alpha, None, None, None, None


@explained
def seq_quantize(
    x: Tensor,
    alpha: Tensor,
    n_bits: int,
    ternary: bool = False,
    gradient_scale: float = 1.0,
    present: Tensor | float = 1.0,
) -> Tensor:
    """Quantize x to `alpha (floor(n x / alpha) + 1/2) / n`, `n = 2**(n_bits - 1)`; ternary to `RHE(1.5 x / alpha)`.

    x: (*) float. alpha: () or broadcastable to x, > 0, same unit as x. Returns (*); at 1 bit `alpha sign(x)`. Gradient
    of x: 1 where |x| <= 0.99 alpha, else 0. Gradient of alpha: the level in units of alpha, minus x / alpha where it is
    not clipped (not at 1 bit), summed over the elements that share it, times `gradient_scale`. `present`: 0 for a
    tensor of zeros, whose levels are 0. Source: Liu et al. 2025,
    ParetoQ, arXiv:2502.02631, eq. 4-6. Deviations: `floor` in place of rounding half to even, where ties
    depend on the code; the ternary range clips at its own level, 2/3, where the published code takes 1. Raises
    ConfigError.

    >>> seq_quantize(torch.tensor([0.62, -0.41, 0.1]), torch.tensor(0.9), 2)
    tensor([ 0.6750, -0.2250,  0.2250])
    """
    check_seq(n_bits, ternary)
    real = x.to(compute_dtype(x))
    value = _Stretched.apply(real, like(alpha, real), like(present, real), n_bits, ternary, gradient_scale)
    return cast_back(cast(Tensor, value), x.dtype)
