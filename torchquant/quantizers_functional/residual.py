"""Multi-bit binary: x as a sum of scaled sign tensors. docs/algorithms.md A9."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._levels import nearest_of
from torchquant.quantizers_functional._row_statistics import WHOLE, Joining, row_sums, row_sums_by_kernel, unit_rows
from torchquant.quantizers_functional.formats import IntegerTerms, Levels

METHODS = ("alternating", "refined", "greedy")


def check_residual(n_bits: int, method: str) -> None:
    """Raise ConfigError unless n_bits is 1..8 and the method is known."""
    if not (isinstance(n_bits, int) and 1 <= n_bits <= 8):
        raise ConfigError(f"n_bits must be a whole number from 1 to 8, got {n_bits!r}")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def sign_patterns(n_bits: int, like: Tensor) -> Tensor:
    """Return all choices of signs, (2**n_bits, n_bits) of -1 and 1, in the type of `like`."""
    bits = _bits(torch.arange(2**n_bits, device=like.device)[None], n_bits).T
    return bits.to(like.dtype) * 2.0 - 1.0


@explained
def residual_levels(alphas: Tensor) -> Tensor:
    """Return the 2**b sums `+-a_1 +-a_2 ...`, sorted. alphas: (..., b). (..., 2**b).

    >>> residual_levels(torch.tensor([2.0, 0.5]))
    tensor([-2.5000, -1.5000,  1.5000,  2.5000])
    """
    patterns = sign_patterns(alphas.shape[-1], alphas)
    # A plain loop over the few scales: a matrix product would round by the number of rows.
    sums = sum(alphas[..., i : i + 1] * patterns[:, i] for i in range(alphas.shape[-1]))
    assert isinstance(sums, Tensor)
    return sums.sort(-1).values


@dataclass(frozen=True, eq=False)
class SignSums(Levels):
    """The sums `+-a_1 +-a_2 ...` of scales, (n,) or (C, n); codes count them from the lowest. Make one with `of`."""

    alphas: Tensor

    @classmethod
    def of(cls, alphas: Tensor, axis: int | None = None) -> SignSums:
        """Make the format with these scales."""
        return cls(residual_levels(alphas), alphas, axis=axis)

    def decoding_numbers(self) -> list[Tensor]:
        return [self.alphas]

    def integer_terms(self) -> IntegerTerms:
        """Return one sign table per scale."""
        alphas = self.alphas.to(torch.float64).cpu()
        n = alphas.shape[-1]
        signs = sign_patterns(n, alphas)
        order = (alphas @ signs.T).argsort(-1)
        return [(alphas[..., i], signs[:, i][order].to(torch.int64)) for i in range(n)]


@explained
def residual_alphas(
    rows: Tensor, n_bits: int, method: str = "alternating", iterations: int = 5, parts: Joining = WHOLE
) -> Tensor:
    """Find the scales of each row. rows: (C, n), n > 0. (C, n_bits) float64.

    "greedy": scale i is the mean magnitude of the residual after i - 1 steps (Guo et al. 2017, network sketching).
    "refined": after each step all scales so far are fitted again by least squares. "alternating": from there,
    `iterations` times, every element takes the nearest sum and the scales are fitted to that (Xu et al. 2018).
    Deviation from the AutoQNN code: each scale is recorded before it is subtracted (docs/algorithms.md I-16). `parts`:
    how the sums over parts of the rows are joined.

    >>> residual_alphas(torch.tensor([[-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]]), 3, "greedy")
    tensor([[0.6667, 0.4222, 0.2037]], dtype=torch.float64)
    """
    check_residual(n_bits, method)
    by_kernel = _greedy_by_kernel(rows, n_bits, parts) if method == "greedy" else None
    if by_kernel is not None:
        return by_kernel
    units, unit = unit_rows(rows, parts)
    if method == "greedy":
        return _greedy_alphas(units, n_bits, parts) * unit.to(torch.float64)[:, None]
    signs = torch.empty(len(units), n_bits, units.shape[1], dtype=units.dtype, device=units.device)
    left, found = units, []
    for i in range(n_bits):
        signs[:, i] = _signs(left)
        found.append(parts.mean(_along(units, signs[:, i : i + 1])))
        alphas = _least_squares(signs[:, : i + 1], torch.cat(found, 1), parts)
        if i + 1 < n_bits:
            total = torch.zeros_like(units)
            for k in range(i + 1):
                total.addcmul_(signs[:, k], alphas[:, k : k + 1].to(units.dtype))
            left = units - total
    patterns = sign_patterns(n_bits, alphas)
    for _ in range(iterations if method == "alternating" else 0):
        sums = (alphas[:, None] * patterns).cumsum(-1)[..., -1]  # in order, and not as a matrix product rounds
        order = sums.sort(1)
        codes = nearest_of(units, order.values.to(units.dtype), order.indices.to(torch.uint8))
        signs = _bits(codes[:, None], n_bits).view(torch.int8).mul_(2).sub_(1).to(units.dtype)
        alphas = _least_squares(signs, parts.mean(_along(units, signs)), parts)
    return alphas * unit.to(torch.float64)[:, None]


def _greedy_by_kernel(rows: Tensor, n_bits: int, parts: Joining) -> Tensor | None:
    alphas = rows.new_empty((len(rows), 0), dtype=torch.float64)
    for _ in range(n_bits):
        sums = row_sums_by_kernel("left_sums", rows, alphas.to(torch.float32))
        if sums is None:
            return None
        alphas = torch.cat([alphas, parts.mean(sums[0] / rows.shape[1])[:, None]], 1)
    return alphas


def _greedy_alphas(left: Tensor, n_bits: int, parts: Joining) -> Tensor:
    alphas = []
    total = torch.zeros_like(left)
    rows = left
    for _ in range(n_bits):
        alphas.append(parts.mean(row_sums(left.abs()) / left.shape[1]))
        total.addcmul_(_signs(left), alphas[-1][:, None].to(left.dtype))
        left = rows - total
    return torch.stack(alphas, 1)


def _signs(x: Tensor) -> Tensor:
    return x.clone().ge_(0.0).mul_(2.0).sub_(1.0)


def _bits(codes: Tensor, n_bits: int) -> Tensor:
    """Return the bits of codes as 0 and 1, the highest first. codes: (..., 1, n). (..., n_bits, n)."""
    return codes >> torch.arange(n_bits - 1, -1, -1, dtype=codes.dtype, device=codes.device)[:, None] & 1


def _along(rows: Tensor, signs: Tensor) -> Tensor:
    """Compute the mean of rows times signs. rows: (C, n). signs: (C, b, n). (C, b) float64."""
    return (row_sums((rows[:, None] * signs).flatten(0, 1)) / rows.shape[1]).unflatten(0, signs.shape[:2])


def _least_squares(signs: Tensor, along: Tensor, parts: Joining) -> Tensor:
    """Find the least-squares scales for given signs by the normal equations; the least-norm ones if singular."""
    n = signs.shape[-1]
    if signs.shape[1] == 1:
        return along
    wide = signs if n <= 2**24 else signs.to(torch.float64)  # sums of signs are exact, in whatever order
    with torch.autocast(signs.device.type, enabled=False):
        sums = torch.bmm(wide, wide.transpose(1, 2)).to(torch.float64)
    inverses = _distinct_inverses(sums, n) if parts is WHOLE else _inverses(parts.mean(sums / n).nan_to_num(0.0))
    return (inverses * along[:, None, :]).sum(-1)


def _distinct_inverses(sums: Tensor, n: int) -> Tensor:
    """Compute pseudo-inverses of the matrices `sums / n`, equal ones once. sums: (C, b, b), integer, at most n."""
    b = sums.shape[1]
    n_keys = (2 * n + 1) ** (b * (b - 1) // 2)
    # Above 4 the last digit of LAPACK depends on the place in the batch.
    if torch.compiler.is_compiling() or sums.device.type != "cpu" or n_keys > 2**40 or b > 4:
        return _inverses(sums / n)
    i, j = torch.triu_indices(b, b, 1)
    key = sums[:, i, j] @ (2.0 * n + 1.0) ** torch.arange(len(i), dtype=sums.dtype)
    distinct, which = key.unique(return_inverse=True)
    first = torch.empty_like(distinct, dtype=torch.int64).scatter_(0, which, torch.arange(len(sums)))
    return _inverses(sums[first] / n)[which]


def _inverses(matrices: Tensor) -> Tensor:
    """Compute `torch.linalg.pinv(matrices, hermitian=True, rtol=1e-10)`, bit for bit, without its overhead."""
    values, vectors = torch.linalg.eigh(matrices)
    size = values.abs()
    inverses = torch.where(size > 1e-10 * size.amax(1, keepdim=True), values.reciprocal(), 0.0)
    return torch.bmm(vectors * inverses[:, None], vectors.transpose(1, 2))
