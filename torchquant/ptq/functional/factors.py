"""Factors of Gram matrices: damping, retries, dead columns."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError, NonFiniteError

WIDEST_FLOAT64 = 2048
"""Columns up to which the factors are computed in float64; above, in float32."""


def dead_columns(gram: Tensor) -> Tensor:
    """Inputs that were 0 in every row: (..., K) truths. gram: (..., K, K)."""
    return gram.diagonal(dim1=-2, dim2=-1) == 0


def dead_filling(gram: Tensor) -> Tensor:
    """Return the mean of the diagonal where a column is dead, 0 elsewhere: (..., K)."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return dead_columns(gram) * torch.where(mean > 0, mean, 1.0)


@explained
def damped_cholesky(gram: Tensor, damp: float = 0.01, retries: int = 3) -> tuple[Tensor, Tensor]:
    """The lower factor of `gram + diag(added)`, and `added`: (..., K, K) and (..., K).

    gram: (..., K, K) symmetric, without negative eigenvalues. `added` is `damp` times the mean of the diagonal; the
    whole mean at a dead column, which goes with no other, so that nothing depends on it. A matrix of the batch that is
    still not positive definite gets ten times the damping, up to `retries` times. In float64 up to 2048 columns, else
    float32.
    Source: Frantar et al. 2023, arXiv:2210.17323, section 3.3. Deviation: the mean, not 1, for dead columns, so that
    scaling the matrix scales the factor. Raises NonFiniteError, and ConfigError where the last try fails.

    >>> damped_cholesky(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), damp=0.5)
    (tensor([[1.5811, 0.0000],
            [0.0000, 1.2247]], dtype=torch.float64), tensor([0.5000, 1.5000], dtype=torch.float64))
    """
    n_columns = gram.shape[-1]
    gram = gram.to(torch.float64 if n_columns <= WIDEST_FLOAT64 else torch.float32)
    if not bool(gram.isfinite().all()):
        raise NonFiniteError(f"the Gram matrix of {n_columns} inputs has NaN or Inf; look at the calibration data")
    if damp < 0:
        raise ConfigError(f"damp must be a number >= 0, got {damp}")
    mean, dead = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True), dead_filling(gram)
    factor = damp * torch.ones_like(mean)
    for _ in range(retries + 1):
        added = factor * mean + dead
        damped = gram.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return lower, added
        factor = torch.where(failed[..., None] > 0, factor * 10, factor)
    raise ConfigError(
        f"a Gram matrix of {n_columns} inputs is not positive definite with damping up to {float(factor.max()) / 10:g} "
        f"of its mean diagonal; give more calibration data than {n_columns} rows, or a larger damp than {damp:g}"
    )


def upper_factor(gram: Tensor, damp: float = 0.01, retries: int = 3) -> Tensor:
    """The upper U with `U @ U.mT` the damped Gram matrix: (..., K, K).

    Damping, dead columns, types and errors are those of `damped_cholesky`. Row i of U, over its diagonal, is what the
    rounding error of column i does to the columns after it.

    >>> upper_factor(torch.tensor([[2.0, 1.6], [1.6, 2.0]]), damp=0.0)
    tensor([[0.8485, 1.1314],
            [0.0000, 1.4142]], dtype=torch.float64)
    """
    return damped_cholesky(gram.flip(-1, -2), damp, retries)[0].flip(-1, -2)


def inverse_factor(gram: Tensor, damp: float = 0.01, retries: int = 3) -> Tensor:
    """The upper U with `U.mT @ U` the inverse of the damped Gram matrix, the inverse of `upper_factor`: (..., K, K).

    Source: Frantar et al. 2023, arXiv:2210.17323, section 3.3. Deviation: the matrix is factored from its last column
    on and the factor inverted, in place of factor, inverse and factor again.

    >>> inverse_factor(torch.tensor([[2.0, 1.6], [1.6, 2.0]]), damp=0.0)
    tensor([[ 1.1785, -0.9428],
            [ 0.0000,  0.7071]], dtype=torch.float64)
    """
    upper = upper_factor(gram, damp, retries)
    one = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, one.expand_as(upper), upper=True)


def largest_eigenvalue(gram: Tensor, most_steps: int = 1000) -> Tensor:
    """The largest eigenvalue of symmetric matrices without negative ones, by power iteration: (..., K, K) to (...).

    It stops where no estimate grows by more than 1e-14 of itself.

    >>> largest_eigenvalue(torch.tensor([[2.0, 1.6], [1.6, 2.0]]))
    tensor(3.6000)
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(gram.shape[-1], 1, generator=generator, dtype=torch.float64).add_(0.5)
    vector = start.to(gram).expand(*gram.shape[:-1], 1)
    found = torch.zeros_like(gram[..., 0, 0])
    for _ in range(most_steps):
        image = gram @ vector
        length = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
        vector = image / length.clamp_min(torch.finfo(gram.dtype).tiny)
        now = (vector * (gram @ vector)).sum((-2, -1))
        if bool((now <= found * (1 + 1e-14)).all()):
            break
        found = now
    return torch.maximum(found, now)
