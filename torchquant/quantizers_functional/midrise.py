"""Mid-rise grids: `(k + 1/2) * alpha + beta`, 2**n_bits levels, none of them at beta. docs/algorithms.md A3."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection
from torchquant.quantizers_functional.uniform import like

# n_bits -> step that minimises the squared error on N(0, 1); docs/algorithms.md H1.
MIDRISE_STEP = {
    1: 1.595769122,
    2: 0.9956866859,
    3: 0.5860194414,
    4: 0.3352006122,
    5: 0.1881387903,
    6: 0.1040630094,
    7: 0.05686767238,
    8: 0.03076238758,
    9: 0.01649895877,
    10: 0.008785464581,
    11: 0.004649841838,
    12: 0.002448411084,
}


def check_midrise(n_bits: int) -> None:
    """Raise ConfigError unless an optimal step is known for the width."""
    if n_bits not in MIDRISE_STEP:
        raise ConfigError(f"n_bits must be a whole number from 1 to {max(MIDRISE_STEP)}, got {n_bits!r}")


def midrise_codes(x: Tensor, step: Tensor | float, shift: Tensor | float, n_bits: int) -> Tensor:
    """`floor((x - shift) / step)`, held to -2**(n-1) .. 2**(n-1) - 1, in x's type. A step of 0 counts as 1."""
    safe = like(step, x)
    safe = torch.where(safe > 0, safe, torch.ones_like(safe))
    half = 2 ** (n_bits - 1)
    return torch.sub(x, like(shift, x)).div_(safe).floor_().clamp_(-half, half - 1)


def midrise_values(codes: Tensor, step: Tensor | float, shift: Tensor | float) -> Tensor:
    """`(codes + 1/2) * step + shift`. codes: (*) float."""
    return (codes + 0.5) * like(step, codes) + like(shift, codes)


@explained
def midrise_quantize(
    x: Tensor,
    step: Tensor | float,
    n_bits: int,
    shift: Tensor | float = 0.0,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to the middle of its cell of width `step`; 2**n_bits cells around `shift`.

    x: (*) float. step, shift: () or broadcastable to x, same unit as x; step >= 0. Returns (*).
    `gradient="clipped"` stops the gradient outside the cells. Raises ConfigError.

    >>> midrise_quantize(torch.tensor([-9.0, -0.1, 0.4, 1.2]), 1.0, 2)
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """
    check_midrise(n_bits)

    def project(real: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        value = midrise_values(midrise_codes(real, step, shift, n_bits), step, shift)
        reach = like(step, real) * 2 ** (n_bits - 1)
        return value, (real - like(shift, real)).abs_().le_(reach) if want_inside else None

    return apply_projection(x, project, gradient, clamp)
