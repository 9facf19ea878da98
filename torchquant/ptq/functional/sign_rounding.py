"""Roundings learned by the sign of their gradients: AutoRound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.errors import ConfigError
from torchquant.ptq.functional.learned_rounding import hard_weight, rounding_share, soft_weight
from torchquant.quantizers_functional._gradient import pass_through

FEW_BITS, MANY_STEPS = 3, 1000
"""Up to so many bits, from so many steps on, the rates are twice as large."""


@explained
def sign_rates(n_steps: int, n_bits: int | None = None) -> list[float]:
    """The rate of each step, falling linearly from 1 / n_steps: `(1 - t / n_steps) / n_steps`.

    Together `(n_steps + 1) / (2 n_steps)`, so that a rounding moves by one level at most. From 2 / n_steps for 3 bits
    and less in 1000 steps and more. Source: Cheng et al. 2023, arXiv:2309.05516.

    >>> sign_rates(4)
    [0.25, 0.1875, 0.125, 0.0625]
    """
    if n_steps < 1:
        raise ConfigError(f"n_steps must be a whole number >= 1, got {n_steps}")
    first = (2.0 if n_bits is not None and n_bits <= FEW_BITS and n_steps >= MANY_STEPS else 1.0) / n_steps
    return [first * (1.0 - step / n_steps) for step in range(n_steps)]


def sign_step(offset: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """`v - rate sign(gradient)`, kept in [-1/2, 1/2]. (*).

    >>> sign_step(torch.tensor([0.0, 0.5]), torch.tensor([3.0, -1.0]), 0.25)
    tensor([-0.2500,  0.5000])
    """
    return (offset - rate * gradient.sign()).clamp(-0.5, 0.5)


@explained
def offset_rounding(share: Tensor, offset: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """The level above where share + v >= 1/2, else the level below; the gradient of v is the gap of the levels. (*).

    share: `rounding_share` of the weight. On a uniform grid it is `s round(w / s + v)`, on any grid it stays with the
    two neighbours. Source: Cheng et al. 2023, arXiv:2309.05516.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> offset_rounding(torch.tensor([0.4]), torch.tensor([0.25]), zero, 0.5 * one)
    tensor([0.5000])
    """
    moved = share + offset
    return pass_through(soft_weight(moved, below, above), hard_weight(moved.detach(), below, above))


@checked
def sign_rounding(
    weight: Tensor,
    below: Tensor,
    above: Tensor,
    loss: Callable[[Tensor], Tensor],
    n_steps: int = 200,
    n_bits: int | None = None,
) -> tuple[Tensor, float]:
    """The rounding of least loss among the steps of a sign descent, and the loss.

    weight: (*). below, above: (*), its neighbours on the grid. loss: of a rounded weight, (). The first step rounds to
    nearest, so it is never worse than that. Offsets are kept in float32 at least: small steps are lost in bfloat16.
    Source: Cheng et al. 2023, arXiv:2309.05516, algorithm 1.

    >>> weight, gram = torch.tensor([0.45, 0.4]), torch.tensor([[2.0, 1.6], [1.6, 2.0]])
    >>> sign_rounding(weight, torch.zeros(2), torch.ones(2), lambda q: (weight - q) @ gram @ (weight - q), 8)[0]
    tensor([1., 0.])
    """
    share = rounding_share(weight, below, above).to(torch.promote_types(weight.dtype, torch.float32))
    offset, best, least = torch.zeros_like(share), None, torch.inf
    for rate in sign_rates(n_steps, n_bits):
        offset.requires_grad_(True)
        rounded = offset_rounding(share, offset, below, above)
        value = loss(rounded)
        if float(value.detach()) < least or best is None:
            best, least = rounded.detach(), float(value.detach())
        (gradient,) = torch.autograd.grad(value, offset)
        offset = sign_step(offset.detach(), gradient, rate)
    assert best is not None
    return best, least
