"""Scales that fit codes, and codes that fit scales: exact moves that never raise the error of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.ptq.functional.columns import Nearest, grid_type
from torchquant.ptq.functional.gram import output_error


@explained
def step_refit(weight: Tensor, codes: Tensor, gram: Tensor, step: Tensor) -> Tensor:
    """The step of least output error for fixed codes, `c H w / c H c`: (..., rows).

    weight, codes: (..., rows, K), codes counted from real 0. gram: (..., K, K). step: (..., rows), which stays where no
    code moves the output or the fit is not positive. The error becomes `w H w - (c H w)^2 / c H c`.
    Source: least squares; Hubara et al. 2020, arXiv:2006.10518, learns it by gradients.

    >>> codes = torch.tensor([[1.0, 2.0]])
    >>> step_refit(0.3 * codes, codes, torch.eye(2), torch.tensor([0.25]))
    tensor([0.3000])
    """
    codes = codes.to(gram.dtype)
    pulled = codes @ gram
    along, square = (pulled * weight.to(gram.dtype)).sum(-1), (pulled * codes).sum(-1)
    fitted = along / square.where(square > 0, 1.0)
    return torch.where((square > 0) & (fitted > 0), fitted, step.to(gram.dtype)).to(step.dtype)


@explained
def linear_refit(weight: Tensor, terms: Tensor, gram: Tensor) -> Tensor:
    """The numbers t of least output error for weights that are `terms t`, codes fixed: (..., rows, P).

    weight: (..., rows, K). terms: (..., rows, K, P), the whole numbers behind each code, a column for each number
    (`Format.integer_terms` at the codes). gram: (..., K, K). `t = inverse(T' H T) T' H w`; of many solutions the least.
    Which of them a format can take, a positive scale say, or a power of two, is for the caller to decide.
    Source: least squares; for signs Xu et al. 2018, arXiv:1802.00150.

    >>> terms = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]])
    >>> linear_refit(torch.tensor([[3.0, 1.0, -1.0]]), terms, torch.eye(3)).round(decimals=4)
    tensor([[2., 1.]])
    """
    terms = terms.to(gram.dtype)
    pulled = terms.mT @ gram[..., None, :, :]
    square, along = pulled @ terms, pulled @ weight.to(gram.dtype)[..., None]
    return (torch.linalg.pinv(square, hermitian=True) @ along)[..., 0].to(weight.dtype)


@checked
def coordinate_descent(weight: Tensor, start: Tensor, gram: Tensor, nearest: Nearest, sweeps: int = 3) -> Tensor:
    """Move one weight at a time to the level of least output error, all others as they are.

    weight, start: (..., rows, K), the real weight and grid values to begin with. gram: (..., K, K). Column after column
    `q_j + r_j / H_jj`, r = H (w - q), is rounded to nearest and taken where the error falls. Any level may be reached,
    not the two neighbours alone. Ends when a sweep changes nothing, or after `sweeps`. Returns grid values.

    >>> gram = torch.tensor([[2.0, 1.6], [1.6, 2.0]])
    >>> coordinate_descent(torch.tensor([[0.4, 0.4]]), torch.zeros(1, 2), gram, lambda x, columns: x.round())
    tensor([[1., 0.]])
    """
    rounded = start.to(gram.dtype, copy=True)
    residual = (weight.to(gram.dtype) - rounded) @ gram
    power = gram.diagonal(dim1=-2, dim2=-1)[..., None, :]
    columns = torch.arange(weight.shape[-1], device=weight.device).expand(*weight.shape[:-2], weight.shape[-1])
    for _ in range(sweeps):
        changed = False
        for j in range(weight.shape[-1]):
            now = slice(j, j + 1)
            old, curve = rounded[..., now], power[..., now]
            wanted = residual[..., now] / curve.where(curve > 0, 1.0)
            new = nearest((old + wanted).to(grid_type(weight)), columns[..., now]).to(gram.dtype)
            move = new - old
            falls = (move - wanted).square() < wanted.square() * (1 - 1e-12)
            move = torch.where(falls, move, 0.0)
            rounded[..., now] = torch.where(falls, new, old)
            residual = residual - move * gram[..., now, :]
            changed = changed or bool(falls.any())
        if not changed:
            break
    return rounded.to(weight.dtype)


@explained
def tune_step(
    weight: Tensor, gram: Tensor, step: Tensor, qmin: int, qmax: int, codes: Tensor | None = None, rounds: int = 5
) -> tuple[Tensor, Tensor]:
    """Refit the step of each row and descend over its codes in turns: steps (..., rows) and codes (..., rows, K).

    weight: (..., rows, K). gram: (..., K, K). step: (..., rows) of a uniform grid `step * {qmin .. qmax}`; codes: those
    to begin with, counted from real 0; rounded to nearest if None. Neither move raises the error.

    >>> weight = torch.tensor([[0.9, 1.8]])
    >>> tune_step(weight, torch.eye(2), torch.tensor([1.0]), -4, 3)
    (tensor([0.9000]), tensor([[1., 2.]]))
    """
    if codes is None:
        codes = (weight / step[..., None]).round().clamp(qmin, qmax)

    def nearest(x: Tensor, columns: Tensor) -> Tensor:
        return x.round().clamp(qmin, qmax)

    for _ in range(rounds):
        step = step_refit(weight, codes, gram, step)
        before, codes = codes, coordinate_descent(weight / step[..., None], codes, gram, nearest)
        if torch.equal(before, codes):
            break
    return step_refit(weight, codes, gram, step), codes


@explained
def best_rows(candidates: Sequence[Tensor], weight: Tensor, gram: Tensor) -> Tensor:
    """Each row from the rounding in which its output error is least; of equal ones the first. (..., rows, K).

    candidates, weight: (..., rows, K); gram: (..., K, K) or its diagonal. With rounding to nearest among them nothing
    gets worse than it; of a scale or a zero rounded down and up it takes the better.

    >>> weight = torch.tensor([[0.4], [0.9]])
    >>> best_rows([torch.zeros(2, 1), torch.ones(2, 1)], weight, torch.eye(1))
    tensor([[0.],
            [1.]])
    """
    errors = torch.stack([output_error(weight - candidate, gram) for candidate in candidates])
    choice = errors.argmin(0)[None, ..., None].expand(1, *weight.shape)
    return torch.stack(list(candidates)).gather(0, choice)[0]
