"""A learned interval of magnitudes and a learned power, then uniform levels in [-1, 1]. docs/algorithms.md B20."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.formats import UniformGrid
from torchquant.quantizers_functional.uniform import like

SMALLEST = 2.0**-100
"""Where the power of a position begins: it has a finite gradient there."""


def check_qil(n_bits: int, activation: bool) -> None:
    """Raise ConfigError unless n_bits is 2..8 (weights) or 1..8 (activations)."""
    if not (isinstance(n_bits, int) and 2 - activation <= n_bits <= 8):
        kind = "activations" if activation else "weights"
        raise ConfigError(f"n_bits must be a whole number from {2 - activation} to 8 ({kind}), got {n_bits!r}")


def unit_grid(n_bits: int, activation: bool) -> UniformGrid:
    """Return the levels of the transformed values: multiples of `1 / largest code` in [-1, 1], or in [0, 1]."""
    largest = 2**n_bits - 1 if activation else 2 ** (n_bits - 1) - 1
    return UniformGrid(1.0, 0, 0 if activation else -largest, largest, divisor=largest)


def qil_transform(x: Tensor, centre: Tensor, distance: Tensor, gamma: Tensor | None) -> Tensor:
    """Compute `sign(x) clamp((|x| - centre + distance) / (2 distance), 0, 1)**gamma`; differentiable in all of them.

    The interval never reaches below 0: a distance above the centre counts as the centre. gamma None: 1.
    """
    half = torch.minimum(distance, centre)
    position = ((x.abs() - (centre - half)) / (2.0 * half)).clamp(0.0, 1.0)
    if gamma is not None:
        position = torch.where(position > 0, position.clamp_min(SMALLEST).pow(gamma), position)
    return x.sign() * position


def qil_preimage(values: Tensor, centre: Tensor, distance: Tensor, gamma: Tensor | None) -> Tensor:
    """Return numbers that `qil_transform` maps to these values, in [-1, 1]."""
    half = torch.minimum(distance, centre)
    size = values.abs() if gamma is None else values.abs().pow(1.0 / gamma)
    return torch.where(size > 0, values.sign() * (centre + half * (2.0 * size - 1.0)), torch.zeros_like(size))


@explained
def qil_quantize(
    x: Tensor,
    centre: Tensor,
    distance: Tensor,
    n_bits: int,
    gamma: Tensor | None = None,
    activation: bool = False,
) -> Tensor:
    """Quantize the position of |x| in the interval `centre +- distance`, raised to gamma, with the sign of x.

    Magnitudes below the interval become 0, those above it 1, whatever the units of x. x: (*) float. centre, distance,
    gamma: () or broadcastable to x, > 0; centre and distance in the unit of x. Returns (*), multiples of
    `1 / (2**(n_bits - 1) - 1)` in [-1, 1]; `activation`: of `1 / (2**n_bits - 1)` in [0, 1]. Gradients: straight
    through the rounding, exact in the rest. Source: Jung et al. 2019, QIL, arXiv:1808.05779, eq. 3-7.
    Raises ConfigError.

    >>> qil_quantize(torch.tensor([0.62, -0.41, 0.1, 0.9]), torch.tensor(0.5), torch.tensor(0.35), 3)
    tensor([ 0.6667, -0.3333,  0.0000,  1.0000])
    """
    check_qil(n_bits, activation)
    real = x.to(compute_dtype(x))
    power = None if gamma is None else like(gamma, real)
    unit = qil_transform(real, like(centre, real), like(distance, real), power)
    return cast_back(unit_grid(n_bits, activation).quantize(unit, "clipped" if activation else "ste"), x.dtype)
