"""Rounding for inputs that the quantized part of the model has already changed.

The target is the float layer on float inputs, `X W'`, the layer gets the quantized inputs Y: `gram` is that of Y,
`Y'Y`, and `cross_gram` is `Y'X`, both (..., K, K) and both sums or both means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.ptq.functional.columns import Nearest, grid_type, round_columns
from torchquant.ptq.functional.factors import damped_cholesky, dead_filling, largest_eigenvalue, upper_factor


@explained
def corrected_weight(weight: Tensor, gram: Tensor, cross_gram: Tensor, damp: float = 0.01) -> Tensor:
    """The weight that comes nearest to the float outputs from the quantized inputs, `inverse(H + c I) (G + c I) w`.

    weight: (..., rows, K). c is `damp` times the mean of the diagonal of H; a large one gives back w. Any rounding for
    the Gram matrix H of the quantized inputs applied to it rounds for mismatched inputs, exactly:
    `|X w - Y q|^2 = |X w - Y v|^2 + (v - q) H (v - q)'` with v from here (and damp = 0).
    Source: Lybrand and Saab 2021, arXiv:2010.15979; Li et al. 2025, arXiv:2504.02692 (GPTAQ), of which it is the whole
    correction at once. Raises as `damped_cholesky`.

    >>> gram = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    >>> corrected_weight(torch.tensor([[1.0, 1.0]]), gram, gram / 2, damp=0.0)
    tensor([[0.5000, 0.5000]])
    """
    lower, added = damped_cholesky(gram, damp)
    wide = weight.to(lower.dtype)
    return torch.cholesky_solve(_damped_target(wide, cross_gram, added).mT, lower).mT.to(weight.dtype)


def _damped_target(weight: Tensor, cross_gram: Tensor, added: Tensor) -> Tensor:
    """`(G + diag(added)) w` of each row: what the outputs should have in common with each quantized input."""
    return weight @ cross_gram.to(weight.dtype).mT + weight * added[..., None, :]


@checked
def gpfq(weight: Tensor, gram: Tensor, cross_gram: Tensor, nearest: Nearest) -> Tensor:
    """Round column after column to what makes the output of the columns so far right: greedy path following.

    weight: (..., rows, K). `q_t = Q(<Y_t, w_t X_t + u> / |Y_t|^2)`, `u += w_t X_t - q_t Y_t`, from the Gram matrices
    alone. Later weights are not changed; a column that was never read is rounded to nearest. Returns grid values.
    Source: Zhang, Zhou, Saab 2023, arXiv:2201.11113.

    >>> gram = torch.tensor([[2.0, 1.6], [1.6, 2.0]])
    >>> gpfq(torch.tensor([[0.4, 0.4]]), gram, gram, lambda x, columns: x.round())
    tensor([[0., 1.]])
    """
    gram, wide = gram.to(torch.float64), weight.to(torch.float64)
    target = wide @ cross_gram.to(torch.float64).tril().mT
    power = gram.diagonal(dim1=-2, dim2=-1)
    columns = torch.arange(weight.shape[-1], device=weight.device).expand(power.shape)
    rounded = torch.zeros_like(wide)
    for t in range(weight.shape[-1]):
        now = slice(t, t + 1)
        rest = target[..., now] - rounded[..., :t] @ gram[..., now, :t].mT
        alive = power[..., None, now] > 0
        real = torch.where(alive, rest / torch.where(alive, power[..., None, now], 1.0), wide[..., now])
        rounded[..., now] = nearest(real.to(grid_type(weight)), columns[..., now]).to(wide.dtype)
    return rounded.to(weight.dtype)


@checked
def qronos(
    weight: Tensor, gram: Tensor, cross_gram: Tensor, nearest: Nearest, damp: float = 1e-6, block: int = 128
) -> Tensor:
    """Round the first column for mismatched inputs, solve for the others, then go on as GPTQ does.

    weight: (..., rows, K). damp: in units of the largest eigenvalue of H; added to G as well, so that with equal inputs
    it is GPTQ with that damping. Returns grid values.
    Source: Zhang et al. 2025, arXiv:2505.11695. Large language models take damp = 1e-3.

    >>> gram = torch.tensor([[2.0, 1.6], [1.6, 2.0]])
    >>> qronos(torch.tensor([[0.4, 0.4]]), gram, gram, lambda x, columns: x.round())
    tensor([[0., 1.]])
    """
    wide = weight.to(torch.float64)
    gram = gram.to(wide.dtype)
    added = damp * largest_eigenvalue(gram)[..., None] + dead_filling(gram)
    target = _damped_target(wide, cross_gram, added)
    damped = gram + added.diag_embed()
    columns = torch.arange(weight.shape[-1], device=weight.device).expand(added.shape)
    real = (target[..., :1] - wide[..., 1:] @ damped[..., 1:, :1]) / damped[..., :1, :1]
    first = nearest(real.to(grid_type(weight)), columns[..., :1]).to(weight.dtype)
    if weight.shape[-1] == 1:
        return first
    factor = upper_factor(damped[..., 1:, 1:], damp=0.0)
    rest = (target[..., 1:] - first.to(wide.dtype) @ damped[..., :1, 1:]).to(factor.dtype)
    half = torch.linalg.solve_triangular(factor.mT, rest, upper=False, left=False)
    solved = torch.linalg.solve_triangular(factor, half, upper=True, left=False).to(grid_type(weight))
    later = round_columns(solved, factor, nearest, columns[..., 1:], block)
    return torch.cat([first, later.to(weight.dtype)], -1)
