"""Second-order rounding: weights column by column, each error passed on to the columns that follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant._arguments import checked
from torchquant.ptq.functional.factors import dead_columns, inverse_factor, upper_factor

Nearest = Callable[[Tensor, Tensor], Tensor]
"""`nearest(x, columns)`: x, (..., rows, k), on the grids of those columns, (..., k) int64, of the weight."""
BeginGroup = Callable[[Tensor, Tensor], None]
"""`begin(weight, columns)`: a group begins; its current weight (..., rows, size) and the columns, (..., size) int64."""


def activation_order(gram: Tensor, group: int = 1) -> Tensor:
    """Columns by the size of what they read, the largest first: (..., K) int64. gram: (..., K, K).

    Groups of `group` neighbours stay together, in the order of their mean; equal ones stay as they are.

    >>> activation_order(torch.tensor([1.0, 3.0, 2.0, 5.0]).diag()), activation_order(torch.eye(4) * 2, group=2)
    (tensor([3, 1, 2, 0]), tensor([0, 1, 2, 3]))
    """
    size = gram.diagonal(dim1=-2, dim2=-1)
    if group > 1:
        size = torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in size.split(group, -1)], -1)
    return size.argsort(dim=-1, descending=True, stable=True)


def grid_type(weight: Tensor) -> torch.dtype:
    """The type in which a grid is asked for the nearest value."""
    return torch.promote_types(weight.dtype, torch.float32)


@checked
def round_columns(
    weight: Tensor,
    factor: Tensor,
    nearest: Nearest,
    columns: Tensor | None = None,
    block: int = 128,
    group: int | None = None,
    begin_group: BeginGroup | None = None,
) -> Tensor:
    """Round the columns of a weight from the first to the last, each error made good in the later ones.

    weight: (..., rows, K), columns in the order in which they are rounded; factor: (..., K, K), `upper_factor` of the
    Gram matrix in the same order; columns: (..., K) int64, the places of the columns in the grid. What a block of
    `block` columns does to those behind it is done at once, which changes nothing but the time. `begin_group` is told
    before the first column of each `group` columns. Returns grid values in weight's type.
    Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1, as Babai's nearest plane (Chen et al. 2025,
    arXiv:2507.18553), which is the same without an inverse.

    >>> factor = upper_factor(torch.tensor([[2.0, 1.6], [1.6, 2.0]]), damp=0.0)
    >>> round_columns(torch.tensor([[0.4, 0.4]]), factor, lambda x, columns: x.round())
    tensor([[0., 1.]])
    """
    wide = factor.new_empty(weight.mT.shape).copy_(weight.mT)  # a column of the weight lies in one piece
    n_columns, kind = weight.shape[-1], grid_type(weight)
    if columns is None:
        columns = torch.arange(n_columns, device=weight.device).expand(*weight.shape[:-2], n_columns)
    rounded, errors, pulled = torch.empty_like(wide, dtype=weight.dtype), torch.empty_like(wide), torch.zeros_like(wide)
    starts = sorted({*range(0, n_columns, block), *range(0, n_columns, group or n_columns)})
    for start, end in zip(starts, [*starts[1:], n_columns], strict=True):
        if begin_group is not None and start % (group or n_columns) == 0:
            whole = slice(start, start + (group or n_columns))
            moved = torch.linalg.solve_triangular(factor[..., whole, whole].mT, pulled[..., whole, :], upper=False)
            begin_group((wide[..., whole, :] + moved).mT.to(kind, copy=True), columns[..., whole])
        now = slice(start, end)
        own, found = factor[..., now, now], errors[..., now, :]
        diagonal = own.diagonal(dim1=-2, dim2=-1)
        unit = (own / diagonal[..., None, :]).mT.contiguous()
        wanted = wide[..., now, :] + pulled[..., now, :] / diagonal[..., None]
        for j in range(end - start):
            real = wanted[..., j : j + 1, :] + unit[..., j : j + 1, :j] @ found[..., :j, :]
            place = slice(start + j, start + j + 1)
            grid = nearest(real.mT.to(kind), columns[..., place]).mT
            rounded[..., place, :] = grid
            torch.sub(wide[..., place, :], grid, out=found[..., j : j + 1, :])
        pulled[..., end:, :] += factor[..., now, end:].mT @ found
    return rounded.mT.contiguous()


@checked
def gptq(
    weight: Tensor,
    gram: Tensor,
    nearest: Nearest,
    order: Tensor | None = None,
    damp: float = 0.01,
    zero_dead: bool = False,
    block: int = 128,
    group: int | None = None,
    begin_group: BeginGroup | None = None,
) -> Tensor:
    """Round a weight so that `tr((W - Q) H (W - Q)')` is small: GPTQ, for any grid that has a nearest value.

    weight: (..., rows, K). gram: (..., K, K), mean or sum of the products of inputs. order: (..., K) int64, a
    permutation such as `activation_order(gram)`; None for the stored order. A column that was never read is rounded to
    nearest, or with `zero_dead` set to 0. Others: `round_columns`, `upper_factor`. Returns grid values of its shape.
    Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1. On the integers without clipping, from the last column
    to the first, it is Babai's nearest plane (arXiv:2507.18553): the error is at most a quarter of the sum of the
    squared pivots. Deviation: dead columns keep their weights, since a column dead on few inputs may live later.

    >>> gptq(torch.tensor([[0.4, 0.4]]), torch.tensor([[2.0, 1.6], [1.6, 2.0]]), lambda x, columns: x.round())
    tensor([[0., 1.]])
    """
    if zero_dead:
        weight = weight.masked_fill(dead_columns(gram)[..., None, :], 0.0)
    if order is None:
        return round_columns(weight, upper_factor(gram, damp), nearest, None, block, group, begin_group)
    along = order[..., None, :].expand(weight.shape)
    both = order[..., :, None], order[..., None, :]
    ordered = gram.take_along_dim(both[0], -2).take_along_dim(both[1], -1)
    factor = upper_factor(ordered, damp)
    rounded = round_columns(weight.gather(-1, along), factor, nearest, order, block, group, begin_group)
    return torch.empty_like(rounded).scatter_(-1, along, rounded)


@checked
def obq(weight: Tensor, gram: Tensor, nearest: Nearest, damp: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round the weights of each row in its own greedy order, the cheapest first; the grid values and the order.

    weight: (..., rows, K). gram: (..., K, K). The cost of rounding weight j is `(w_j - q_j)^2 / inverse(H)_jj`. Takes
    rows * K^2 numbers of memory: for small layers, and to compare with. Returns two (..., rows, K), the second int64.
    Source: Frantar et al. 2022, arXiv:2208.11580, algorithm 3. It may end worse than `gptq`: it spends the free
    columns on small errors and rounds the large ones when none is left to make them good.

    >>> obq(torch.tensor([[0.4, 0.3]]), torch.tensor([[2.0, 1.6], [1.6, 2.0]]), lambda x, columns: x.round())
    (tensor([[1., 0.]]), tensor([[1, 0]]))
    """
    factor = inverse_factor(gram, damp)
    inverse = (factor.mT @ factor)[..., None, :, :].repeat_interleave(weight.shape[-2], -3)
    left, n_columns = weight.to(factor.dtype, copy=True), weight.shape[-1]
    columns = torch.arange(n_columns, device=weight.device).expand(*weight.shape[:-2], n_columns)
    rounded, done = torch.zeros_like(left), torch.zeros_like(left, dtype=torch.bool)
    order = []
    for _ in range(n_columns):
        grid = nearest(left.to(grid_type(weight)), columns).to(left.dtype)
        pivots = inverse.diagonal(dim1=-2, dim2=-1).masked_fill(done, 1.0)
        j = ((left - grid).square() / pivots).masked_fill(done, torch.inf).argmin(-1, keepdim=True)
        rounded.scatter_(-1, j, grid.gather(-1, j))
        done.scatter_(-1, j, True)
        line = inverse.take_along_dim(j[..., None], -2)
        scaled = line / pivots.gather(-1, j)[..., None]
        left = left - (left - grid).gather(-1, j) * scaled[..., 0, :]
        inverse = inverse - line.mT * scaled
        order.append(j)
    return rounded.to(weight.dtype), torch.cat(order, -1)
