"""Orthogonal matrices that spread outliers: Hadamard matrices without tables, their fast transform, learned ones."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.errors import ConfigError

LARGEST_BASE = 1024
"""Rows of a Paley matrix up to which a transform that multiplies by it is taken for fast."""


@checked
def hadamard_factors(n: int) -> tuple[int, int] | None:
    """(2^k, m) with n = 2^k m, m the smallest that is 1 or the order of a Paley matrix; None if there is none.

    Paley's orders are q + 1 for primes q = 3 mod 4, and 2 (q + 1) for primes q = 1 mod 4.
    Source: Paley 1933, "On orthogonal matrices".

    >>> hadamard_factors(4096), hadamard_factors(3584), hadamard_factors(13696)
    ((4096, 1), (128, 28), None)
    """
    if n < 1:
        raise ConfigError(f"a Hadamard matrix has at least 1 row, got {n}")
    odd = n // (n & -n)
    if odd == 1:
        return n, 1
    base = odd
    while n % base == 0:
        if _paley_prime(base) is not None:
            return n // base, base
        base *= 2
    return None


def _paley_prime(order: int) -> int | None:
    """The prime behind the Paley matrix of this order."""
    for prime, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if prime % 4 == rest and order % 4 == 0 and _is_prime(prime):
            return prime
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


@lru_cache(maxsize=8)
def _paley(order: int) -> Tensor:
    """(order, order) int8 of -1 and 1, orthogonal rows; order 1 or Paley's."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    prime = _paley_prime(order)
    assert prime is not None
    character = torch.full((prime,), -1, dtype=torch.int8)
    character[torch.arange(prime).square() % prime] = 1
    character[0] = 0
    numbers = torch.arange(prime)
    core = torch.ones(prime + 1, prime + 1, dtype=torch.int8)
    core[0, 0] = 0
    core[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    one = torch.eye(prime + 1, dtype=torch.int8)
    if prime % 4 == 3:
        core[1:, 0] = -1
        return core + one
    square, side = (torch.tensor(rows, dtype=torch.int8) for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(core, square) + torch.kron(one, side)


def _factors(n: int) -> tuple[int, int]:
    found = hadamard_factors(n)
    if found is None:
        raise ConfigError(
            f"no Hadamard matrix of {n} rows is known here; take one of {hadamard_block(n)} rows, which divides it, "
            "in blocks, or a random rotation"
        )
    return found


@checked
def hadamard(n: int) -> Tensor:
    """A matrix H of -1 and 1 with `H H' = n I`: (n, n) int8. Sylvester's doubling of a Paley matrix.

    Raises ConfigError where there is none, and says which size divides n.

    >>> hadamard(4) @ torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    tensor([10, -2, -4,  0], dtype=torch.int8)
    """
    power, base = _factors(n)
    matrix = _paley(base).clone()
    double = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(double, matrix)
    return matrix


@checked
def hadamard_block(n: int, largest_base: int = LARGEST_BASE) -> int:
    """The largest divisor of n that has a Hadamard matrix with a Paley factor of at most `largest_base` rows.

    >>> hadamard_block(29568), hadamard_block(13696), hadamard_block(11008)
    (29568, 128, 256)
    """
    for divisor in (n // i for i in range(1, n + 1) if n % i == 0):
        found = hadamard_factors(divisor)
        if found is not None and found[1] <= largest_base:
            return divisor
    raise ConfigError(f"a Hadamard matrix has at least 1 row, got {n}")


@explained
def hadamard_transform(x: Tensor, block: int | None = None) -> Tensor:
    """`H x / sqrt(n)` of each run of `block` elements of the last axis, of all n by default: (..., n), in x's type.

    Applied to the inputs of a layer and to the rows of its weight it leaves the product as it is. O(n log n) for powers
    of two; a Paley factor is a matrix product. Half types are transformed in float32. Raises ConfigError where n is no
    multiple of the block or the block has no Hadamard matrix (an odd one).
    Source: Ashkboos et al. 2024, arXiv:2404.00456; blocks for formats with block scales, arXiv:2511.04214.

    >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([ 5., -1., -2.,  0.])
    """
    size = x.shape[-1] if block is None else block
    power, base = _factors(size)
    if x.shape[-1] % size:
        raise ConfigError(f"blocks of {size} do not divide {x.shape[-1]} elements; take one that does")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = wide.unflatten(-1, (-1, power, base))
    half = 1
    while half < power:
        first, second = parts.unflatten(-2, (-1, 2, half)).unbind(-3)
        parts = torch.stack([first + second, first - second], -3).flatten(-4, -2)
        half *= 2
    if base > 1:
        parts = parts @ _paley(base).to(wide).mT
    return (parts.flatten(-3) / math.sqrt(size)).to(x.dtype)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """(n,) of -1 and 1; times the input before a Hadamard transform they make it a random one.

    >>> random_signs(3, torch.Generator().manual_seed(0)).abs()
    tensor([1., 1., 1.])
    """
    return torch.randint(0, 2, (n,), generator=generator).to(torch.float32) * 2 - 1


@explained
def orthogonalized(matrix: Tensor) -> Tensor:
    """The orthogonal Q of `Z = Q R` with a positive diagonal of R, differentiable: (..., n, n) from any Z of full rank.

    A rotation that is learned through it needs no optimizer of its own. Source: DartQuant 2025, arXiv:2511.04063, whose
    QR-Orth it is.

    >>> orthogonalized(torch.tensor([[3.0, 5.0], [0.0, 2.0]])).abs()
    tensor([[1., 0.],
            [0., 1.]])
    """
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


@checked
def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix drawn uniformly: (n, n) float64. For sizes without a Hadamard matrix, where it is folded.

    Source: Mezzadri 2007, arXiv:math-ph/0609050.

    >>> q = random_orthogonal(3, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(q @ q.mT, torch.eye(3, dtype=torch.float64)))
    True
    """
    return orthogonalized(torch.randn(n, n, generator=generator, dtype=torch.float64))


@explained
def cayley_step(rotation: Tensor, skew: Tensor) -> Tensor:
    """`inverse(I + A / 2) (I - A / 2) R`, orthogonal again: a step of gradient descent on rotations. (..., n, n).

    skew: A = -A', the rate times `G R' - R G'` for a gradient G. A part of it that is not skew is left out.
    Source: Liu et al. 2024, arXiv:2405.16406 (SpinQuant), after Li et al. 2020, arXiv:2002.01113.

    >>> cayley_step(torch.eye(2), torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    half = (skew - skew.mT) / 4
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(one + half, (one - half) @ rotation)
