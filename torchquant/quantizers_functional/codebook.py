"""Codebooks: levels that minimise the squared error on the data, by Lloyd's algorithm. docs/algorithms.md A10."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._levels import level_values, nearest_level


@explained
def lloyd_max(rows: Tensor, n_levels: int, iterations: int = 100, zero: bool = False) -> Tensor:
    """Find the levels of each row by Lloyd's algorithm, sorted. rows: (C, n), n > 0. (C, n_levels) float64.

    It starts at the quantiles (i + 1/2) / n_levels; then, `iterations` times, thresholds are put midway between levels
    and each level at the mean of its cell. A level whose cell is empty goes to the far end of the cell of largest
    error. `zero` pins the level nearest to 0 there. With as many levels as values nothing is lost. The number of steps
    is fixed, so that a row gets the same levels alone as among others. Max 1960; Lloyd 1982.

    >>> lloyd_max(torch.tensor([[1.0, 1.1, 5.0, 5.2]]), 2)
    tensor([[1.0500, 5.1000]], dtype=torch.float64)
    """
    data = rows.to(torch.float64).contiguous().sort(1).values
    n = data.shape[1]
    zeros = torch.zeros_like(data[:, :1])
    sums = torch.cat([zeros, data.cumsum(1)], 1)
    squares = torch.cat([zeros, data.square().cumsum(1)], 1)
    quantiles = ((torch.arange(n_levels, device=rows.device) + 0.5) / n_levels * n).long().clamp(max=n - 1)
    levels = data[:, quantiles]
    first, last = torch.zeros_like(quantiles[:1]), torch.full_like(quantiles[:1], n)
    for _ in range(iterations):
        levels = _pinned(levels, zero)
        inner = torch.searchsorted(data, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), right=True)
        edges = torch.cat([first.expand(len(data), 1), inner, last.expand(len(data), 1)], 1)
        count = edges.diff(dim=1)
        total = sums.gather(1, edges).diff(dim=1)
        mean = total / count.clamp_min(1)
        error = squares.gather(1, edges).diff(dim=1) - total * mean
        error = torch.where(count > 1, error.clamp_min(0.0), torch.zeros_like(error))
        moved = torch.where(count > 0, mean, levels)
        worst = error.argmax(1, keepdim=True)
        empty = (count == 0).to(torch.int8).argmax(1, keepdim=True)
        far_end = data.gather(1, (edges.gather(1, worst + 1) - 1).clamp_min(0))
        # Below a millionth of the rounding error, splitting a cell gains nothing.
        can_split = (count == 0).any(1, keepdim=True) & (error.gather(1, worst) > 1e-12 * squares[:, -1:])
        moved = torch.where(can_split, moved.scatter(1, empty, far_end), moved)
        levels = moved.sort(1).values
    return _pinned(levels, zero)


def _pinned(levels: Tensor, zero: bool) -> Tensor:
    if not zero:
        return levels
    nearest = levels.abs().argmin(1, keepdim=True)
    return levels.scatter(1, nearest, torch.zeros_like(levels[:, :1]))


class _ToBoth(torch.autograd.Function):
    """Returns `value`; both x and value get the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # torch 2.14 does not trace `mark_dirty` of a value that needs a gradient
            return value.clone()
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


@explained
def codebook_quantize(x: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """Quantize x to the nearest level, differentiable in x and levels.

    x: (*) float. levels: (L,) sorted, or (C, L) for the slices of `axis`, same unit as x. Returns (*). Gradient of x:
    straight through. Gradient of a level: the sum over the elements that took it.

    >>> levels = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> codebook_quantize(torch.tensor([0.1, 5.0, 1.5]), levels).sum().backward()
    >>> levels.grad
    tensor([0., 1., 2.])
    """
    real = x.to(compute_dtype(x))
    table = levels.to(real.dtype)
    with torch.no_grad():
        index = nearest_level(real, table, axis)
        not_a_number = real.detach().clamp(0.0, 0.0)
    value = level_values(index, table, axis) + not_a_number
    return cast_back(cast(Tensor, _ToBoth.apply(real, value)), x.dtype)
