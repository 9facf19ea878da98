"""Multi-bit binary: x as a sum of scaled sign tensors. docs/algorithms.md A9."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._levels import nearest_level
from torchquant.quantizers_functional._sums import row_sums, unit_rows

METHODS = ("alternating", "refined", "greedy")


def check_residual(n_bits: int, method: str) -> None:
    """Raise ConfigError unless n_bits is 1..8 and the method known."""
    if not (isinstance(n_bits, int) and 1 <= n_bits <= 8):
        raise ConfigError(f"n_bits must be a whole number from 1 to 8, got {n_bits!r}")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def sign_patterns(n_bits: int, like: Tensor) -> Tensor:
    """All choices of signs, (2**n_bits, n_bits) of -1 and 1, in the type of `like`."""
    codes = torch.arange(2**n_bits, device=like.device)[:, None]
    bits = (codes >> torch.arange(n_bits - 1, -1, -1, device=like.device)) & 1
    return bits.to(like.dtype) * 2.0 - 1.0


def residual_levels(alphas: Tensor) -> Tensor:
    """The 2**b sums `+-a_1 +-a_2 ...`, sorted. alphas: (..., b). (..., 2**b).

    >>> residual_levels(torch.tensor([2.0, 0.5]))
    tensor([-2.5000, -1.5000,  1.5000,  2.5000])
    """
    patterns = sign_patterns(alphas.shape[-1], alphas)
    # A plain loop over the few scales: a matrix product would round by the number of rows.
    sums = sum(alphas[..., i : i + 1] * patterns[:, i] for i in range(alphas.shape[-1]))
    assert isinstance(sums, Tensor)
    return sums.sort(-1).values


def residual_alphas(rows: Tensor, n_bits: int, method: str = "alternating", iterations: int = 5) -> Tensor:
    """The scales of each row. rows: (C, n), n > 0. (C, n_bits) float64.

    "greedy": scale i is the mean magnitude of what is left after i - 1 steps (Guo et al. 2017, network sketching).
    "refined": after each step all scales so far are fitted again by least squares. "alternating": from there,
    `iterations` times, every element takes the nearest sum and the scales are fitted to that (Xu et al. 2018).
    Deviation from the AutoQNN code: each scale is recorded before it is subtracted (docs/algorithms.md I-16).

    >>> residual_alphas(torch.tensor([[-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]]), 3, "greedy")
    tensor([[0.6667, 0.4222, 0.2037]], dtype=torch.float64)
    """
    check_residual(n_bits, method)
    units, unit = unit_rows(rows)
    signs: list[Tensor] = []
    left, alphas = units, torch.zeros(len(rows), 0, dtype=torch.float64, device=rows.device)
    for _ in range(n_bits):
        alpha = row_sums(left.abs()) / left.shape[1]
        signs.append(left.ge(0.0).to(left.dtype).mul_(2.0).sub_(1.0))
        alphas = torch.cat([alphas, alpha[:, None]], 1)
        if method != "greedy":
            alphas = _least_squares(units, signs)
        left = units - sum(s * alphas[:, i : i + 1].to(s.dtype) for i, s in enumerate(signs))
    if method == "alternating":
        patterns = sign_patterns(n_bits, units)
        for _ in range(iterations):
            sums = sum(alphas[:, i : i + 1] * patterns[:, i] for i in range(n_bits))
            assert isinstance(sums, Tensor)
            order = sums.sort(1)
            nearest = order.indices.gather(1, nearest_level(units, order.values.to(units.dtype), 0))
            alphas = _least_squares(units, [patterns[:, i][nearest] for i in range(n_bits)])
    return alphas * unit.to(torch.float64)[:, None]


def _least_squares(rows: Tensor, signs: list[Tensor]) -> Tensor:
    """The scales of least squared error for given signs, by the normal equations; the least-norm ones if singular."""
    n = rows.shape[1]
    gram = torch.stack([torch.stack([row_sums(a * b) / n for b in signs], -1) for a in signs], -1)
    along = torch.stack([row_sums(rows * a) / n for a in signs], -1)
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10)
    return (inverse * along[:, None, :]).sum(-1)
