"""Weights with smaller maxima and almost the same outputs (MagR)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.ptq.functional.factors import largest_eigenvalue


@explained
def l1_ball(v: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    """The point of `sum |p| <= radius` that is nearest to v, for each slice of the last axis.

    v: (..., K). radius: >= 0, () or broadcastable to (..., 1). Source: Duchi et al. 2008, "Efficient projections onto
    the l1-ball", figure 1.

    >>> l1_ball(torch.tensor([0.75, -0.5, 0.125, 0.0]))
    tensor([ 0.6250, -0.3750,  0.0000,  0.0000])
    """
    radius = torch.as_tensor(radius, dtype=v.dtype, device=v.device)
    size = v.abs()
    falling = size.sort(-1, descending=True).values
    over = falling.cumsum(-1) - radius
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    n_kept = (falling * count > over).sum(-1, keepdim=True).clamp_min(1)
    cut = (over.gather(-1, n_kept - 1) / n_kept).clamp_min(0.0)
    shrunk = v.sign() * (size - cut).clamp_min(0.0)
    return torch.where(size.sum(-1, keepdim=True) <= radius, v, shrunk)


def max_norm_prox(v: Tensor, weight: Tensor | float) -> Tensor:
    """The x of least `|x - v|^2 / 2 + weight * max |x|`, for each slice of the last axis: `v - l1_ball(v, weight)`.

    v: (..., K). weight: >= 0, () or broadcastable to (..., 1).

    >>> max_norm_prox(torch.tensor([0.9, -0.5, 0.25]), 0.4)
    tensor([ 0.5000, -0.5000,  0.2500])
    """
    return v - l1_ball(v, weight)


@explained
def reduce_magnitude(weight: Tensor, gram: Tensor, alpha: float, steps: int = 200) -> Tensor:
    """Lower the maximum of each row where the outputs hardly change: least `(W - V) H (W - V)' / 2 + alpha max |W|`.

    weight: (..., rows, K), V of the formula. gram: (..., K, K); alpha in its units times those of the weight. Proximal
    gradient steps of 1 / the largest eigenvalue; the objective falls with each. Returns (..., rows, K), to be rounded
    on scales of its own. Source: Zhang et al. 2024, arXiv:2406.00800, algorithm 1.

    >>> gram = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> reduce_magnitude(torch.tensor([[1.0, 0.0]]), gram, alpha=0.01)
    tensor([[0.4975, 0.4975]])
    """
    start = weight.to(torch.promote_types(gram.dtype, torch.float32))
    rate = 1.0 / largest_eigenvalue(gram)[..., None, None]
    rate = torch.where(rate.isfinite(), rate, 0.0)
    moved = start
    for _ in range(steps):
        moved = max_norm_prox(moved - rate * ((moved - start) @ gram), rate * alpha)
    return moved.to(weight.dtype)
