"""Real zero points without data: half-quadratic quantization."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchquant._arguments import explained

NORM, STRENGTH, GROWTH = 0.7, 10.0, 1.01
"""The exponent p of the norm, and beta with its growth in each round."""


class RealZero(NamedTuple):
    """The real zeros of grids `scale (code - zero)`, (..., rows, 1); codes and values on them, (..., rows, n)."""

    zero: Tensor
    codes: Tensor
    rounded: Tensor


@explained
def shrink(x: Tensor, beta: float, p: float = NORM) -> Tensor:
    """`sign(x) max(|x| - |x|^(p - 1) / beta, 0)`: errors without the small ones. (*); 0 stays 0.

    Source: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models".

    >>> shrink(torch.tensor([-1.0, 0.05, 0.0]), 10.0)
    tensor([-0.9000,  0.0000,  0.0000])
    """
    size = x.abs()
    less = size - size.where(size > 0, 1.0).pow(p - 1.0) / beta
    return x.sign() * torch.where(size > 0, less.clamp_min(0.0), 0.0)


def at_zero(weight: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> RealZero:
    """Round to nearest on `scale (code - zero)`. weight: (..., rows, n); scale, zero: (..., rows, 1).

    >>> at_zero(torch.tensor([[0.3, 1.2]]), torch.tensor([[0.5]]), torch.tensor([[0.25]]), 0, 3).codes
    tensor([[1., 3.]])
    """
    codes = (weight / scale + zero).round().clamp(qmin, qmax)
    return RealZero(zero, codes, scale * (codes - zero))


@explained
def half_quadratic_zero(
    weight: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, most_rounds: int = 20
) -> RealZero:
    """Move the zero of each row so that few weights have large errors.

    weight: (..., rows, n), a row one group. scale, zero: (..., rows, 1), `value = scale (code - zero)`. In turns
    `e = shrink(w - w_hat)`, `zero = mean(code - (w - e) / scale)`; beta from 10 times 1.01 each round. A row whose
    mean |w - w_hat| has stopped falling is done, and its best round is kept.
    Source: Badri and Shaji 2023; the stop is that of its code (the mean of |error|, where the article has |error|^p).
    The zero is the offset `-scale zero` of an asymmetric grid; rounding it to a whole number may lose what was gained
    and more: `at_zero` of both whole numbers says what is left.

    >>> weight = torch.tensor([[0.1, 0.12, 0.08, 0.1, 0.9]])
    >>> scale, zero = torch.tensor([[0.8]]), torch.tensor([[-0.1]])
    >>> found = half_quadratic_zero(weight, scale, zero, 0, 1)
    >>> bool((weight - found.rounded).abs().mean() < (weight - at_zero(weight, scale, zero, 0, 1).rounded).abs().mean())
    True
    """
    beta, best, least = STRENGTH, None, torch.full_like(scale, torch.inf)
    for _ in range(most_rounds):
        now = at_zero(weight, scale, zero, qmin, qmax)
        error = (weight - now.rounded).abs().mean(-1, keepdim=True)
        falls = error < least
        best = now if best is None else RealZero(*(torch.where(falls, *pair) for pair in zip(now, best, strict=True)))
        least = torch.where(falls, error, least)
        if not bool(falls.any()):
            break
        large = shrink(weight - now.rounded, beta)
        zero = torch.where(falls, (now.codes - (weight - large) / scale).mean(-1, keepdim=True), zero)
        beta *= GROWTH
    assert best is not None
    return best
