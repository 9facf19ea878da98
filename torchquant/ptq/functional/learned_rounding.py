"""Roundings up or down that are learned by gradients: AdaRound, BRECQ, QDrop. On any grid that has neighbours.

A weight w between the levels `below` and `above` becomes `below + h (above - below)`, h in [0, 1]. Where the two are
one (w is on a level, or clipped) there is nothing to learn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""The sigmoid is stretched to these, so that h reaches 0 and 1."""
DECIDED = 0.49
"""h has decided where it is farther than this from one half."""


@explained
def rectified_sigmoid(v: Tensor) -> Tensor:
    """`clamp(1.2 sigmoid(v) - 0.1, 0, 1)`, the share h of a weight's way up. v: (*).

    Source: Nagel et al. 2020, arXiv:2004.10568, equation 23.

    >>> rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (v.sigmoid() * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)


def rounding_share(weight: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """How far a weight is on its way up, `(w - below) / (above - below)` in [0, 1]; 1/2 where both levels are one. (*).

    >>> rounding_share(torch.tensor([1.5, 9.0]), torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0]))
    tensor([0.2500, 0.5000])
    """
    gap = above - below
    return torch.where(gap > 0, ((weight - below) / gap.where(gap > 0, 1.0)).clamp(0.0, 1.0), 0.5)


@explained
def rounding_logits(weight: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """The v at which the soft weight is the float one, `rectified_sigmoid(v) = rounding_share(w)`: (*).

    Within [-2.398, 2.398]; 0 where both levels are one.

    >>> rounding_logits(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.ones(2))
    tensor([-2.3979,  2.3979])
    """
    share = rounding_share(weight, below, above)
    return -((STRETCH_HIGH - STRETCH_LOW) / (share - STRETCH_LOW) - 1.0).log()


def soft_weight(share: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """`below + h (above - below)`, with a gradient for h and for the numbers behind the levels. (*).

    >>> soft_weight(torch.tensor([0.25]), torch.tensor([1.0]), torch.tensor([3.0]))
    tensor([1.5000])
    """
    return below + share * (above - below)


def hard_weight(share: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """The level above where h is at least one half, else the level below: grid values, bit for bit. (*).

    >>> hard_weight(torch.tensor([0.5, 0.4]), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]))
    tensor([3., 1.])
    """
    return torch.where(share >= 0.5, above, below)


def undecided(share: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """How many weights that have a choice are not yet near a level, `|h - 1/2| <= .49`: () int64.

    >>> undecided(torch.tensor([0.5, 1.0, 0.5]), torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]))
    tensor(1)
    """
    return (((share - 0.5).abs() <= DECIDED) & (above > below)).sum()


@explained
def rounding_regulariser(share: Tensor, beta: float) -> Tensor:
    """`sum 1 - |2 h - 1|^beta`, 0 where every h is 0 or 1: (). share: (*); leave out weights that have no choice.

    Source: Nagel et al. 2020, arXiv:2004.10568, equation 24.

    >>> rounding_regulariser(torch.tensor([0.0, 0.75]), 2.0)
    tensor(0.7500)
    """
    return (1.0 - (2.0 * share - 1.0).abs().pow(beta)).sum()


@explained
def rounding_beta(
    step: int, n_steps: int, start: float = 20.0, end: float = 2.0, warm_up: float = 0.2, schedule: str = "linear"
) -> float | None:
    """The exponent of the regulariser at a step 0 .. n_steps - 1; None in the first fifth, which goes without it.

    schedule: "linear" or "cosine", from `start` at the end of the warm-up to `end` at the last step and after.
    Source: Nagel et al. 2020, arXiv:2004.10568, section 3.3; the numbers are those of its and BRECQ's code.

    >>> [rounding_beta(step, 11, warm_up=0.0) for step in (0, 5, 10)], rounding_beta(1, 10)
    ([20.0, 11.0, 2.0], None)
    """
    if schedule not in ("linear", "cosine"):
        raise ConfigError(f"schedule must be 'linear' or 'cosine', got {schedule!r}")
    first = warm_up * n_steps
    if step < first:
        return None
    done = min(1.0, (step - first) / max(1.0, n_steps - 1 - first))
    left = 1.0 - done if schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
    return end + (start - end) * left


@explained
def block_error(found: Tensor, wanted: Tensor, gradient: Tensor | None = None, power: float = 2.0) -> Tensor:
    """The loss of a block's output: summed over features, the mean over all else, weighted by squared gradients: ().

    found, wanted: (..., features), or (N, features, ...) moved so. gradient: of the task loss for `wanted`, same shape;
    the diagonal of the Fisher matrix. power: 2, or 2.4 for the steps of activations.
    Source: Li et al. 2021, arXiv:2102.05426, equation 10.

    >>> block_error(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)), block_error(
    ...     torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([[1.0, 0.5]]))
    (tensor(5.), tensor(2.))
    """
    error = (found - wanted).abs().pow(power)
    return (error if gradient is None else error * gradient.square()).sum(-1).mean()


@explained
def drop_quantization(
    x: Tensor, quantized: Tensor, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Each element of x as it is with this probability, else quantized: what a block reads while it is optimized. (*).

    Source: Wei et al. 2022, arXiv:2203.05740. Probability 0 is the quantized input, which evaluation uses.

    >>> drop_quantization(torch.tensor([0.4]), torch.tensor([0.0]), 1.0)
    tensor([0.4000])
    """
    if not 0.0 <= probability <= 1.0:
        raise ConfigError(f"probability must be a number from 0 to 1, got {probability}")
    drawn = torch.rand(x.shape, generator=generator, device=x.device if generator is None else generator.device)
    return torch.where(drawn.to(x.device) < probability, x, quantized)


@explained
def expected_drop_error(rounded: Tensor, weight: Tensor, x: Tensor, quantized: Tensor, probability: float) -> Tensor:
    """Expected squared error of an output under `drop_quantization`: (n, rows).

    rounded, weight: (rows, K); x, quantized: (n, K). `(q (x + (1 - p) d) - w x)^2 + p (1 - p) sum (q_j d_j)^2`, d the
    change of the input: a penalty on weights whose inputs change much.

    >>> one = torch.ones(1, 1)
    >>> expected_drop_error(one, one, one, 3 * one, 0.5)
    tensor([[2.]])
    """
    change = quantized - x
    mean = (x + (1.0 - probability) * change) @ rounded.mT - x @ weight.mT
    return mean.square() + probability * (1.0 - probability) * change.square() @ rounded.square().mT
