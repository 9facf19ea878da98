"""What a few directions of full precision make good of a rounding: `W = Q + A B` of small rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.ptq.functional.factors import damped_cholesky


@explained
def low_rank_terms(
    residual: Tensor, rank: int, gram: Tensor | None = None, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The A (..., rows, r) and B (..., r, K) whose product comes nearest to a residual, r at most `rank`.

    residual: (..., rows, K), `W - Q`. Without a Gram matrix the nearest in squares, by the singular values (Eckart and
    Young). With `gram`, (..., K, K), the least `tr((R - AB) H (R - AB)')`: with `H = S S'` the singular vectors of R S,
    taken back through S. Sources: Yao et al. 2023, arXiv:2303.08302 (LoRC); Zhang et al. 2024,
    arXiv:2410.06040 (QERA), theorem 1. Raises as `damped_cholesky`.

    >>> left, right = low_rank_terms(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
    >>> left @ right
    tensor([[3., 0.],
            [0., 0.]])
    """
    if gram is None:
        left, values, right = torch.linalg.svd(residual.to(torch.promote_types(residual.dtype, torch.float32)), False)
    else:
        lower, _ = damped_cholesky(gram, damp)
        left, values, white = torch.linalg.svd(residual.to(lower.dtype) @ lower, full_matrices=False)
        right = torch.linalg.solve_triangular(lower, white, upper=False, left=False)
    terms = left[..., :rank] * values[..., None, :rank], right[..., :rank, :]
    return terms[0].to(residual.dtype), terms[1].to(residual.dtype)


@checked
def loftq(
    weight: Tensor, rank: int, quantize: Callable[[Tensor], Tensor], rounds: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight and its low-rank correction in turns: Q, A and B with `Q + A B` near the weight.

    weight: (..., rows, K). quantize: a weight to its grid, scales found anew. The best of the rounds is kept.
    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1. Deviation: the paper keeps the last round.

    >>> weight = torch.tensor([[1.4, 2.6], [0.3, 1.1]])
    >>> rounded, left, right = loftq(weight, 1, lambda w: w.round())
    >>> bool((weight - rounded - left @ right).norm() < (weight - rounded).norm())
    True
    """
    best, least = None, torch.inf
    correction = torch.zeros_like(weight)
    for _ in range(rounds):
        rounded = quantize(weight - correction)
        left, right = low_rank_terms(weight - rounded, rank)
        correction = left @ right
        error = float((weight - rounded - correction).square().sum())
        if error < least or best is None:
            best, least = (rounded, left, right), error
    assert best is not None
    return best
