"""Powers of two without zero: {+-alpha 2**i}, assigned to the nearest in value. docs/algorithms.md A5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant._tensors import divided, like
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection
from torchquant.quantizers_functional._powers import floor_pow2, pow2
from torchquant.quantizers_functional.formats import KernelCall, ScaledFormat
from torchquant.quantizers_functional.uniform import integer_codes

# n_bits -> alpha that minimises the squared error on N(0, 1); docs/algorithms.md H3.
POT_ALPHA = {1: 0.7978845608, 2: 0.6510138149, 3: 0.2690296406, 4: 0.03278027138, 5: 0.0002562737992}


def check_pot(n_bits: int) -> None:
    """Raise ConfigError unless an optimal scale is known for the width."""
    if n_bits not in POT_ALPHA:
        raise ConfigError(
            f"n_bits must be a whole number from 1 to {max(POT_ALPHA)}, got {n_bits!r}; more bits add no precision"
        )


def pot_max(n_bits: int) -> float:
    """Return the largest magnitude before scaling."""
    return float(2.0 ** (2 ** (n_bits - 1) - 1))


def pot_magnitudes(x: Tensor, alpha: Tensor | float, n_bits: int) -> Tensor:
    """Return the power of two of the unscaled grid nearest to |x| / alpha; midpoints go up. NaN stays NaN."""
    safe = like(alpha, x)
    safe = torch.where(safe > 0, safe, torch.ones_like(safe))
    scaled = x.abs().div_(safe)
    return (
        floor_pow2(divided(scaled, 1.5)).mul_(2.0).clamp_(1.0, pot_max(n_bits)).add_(scaled.clamp_(0.0, 1.0).mul_(0.0))
    )


def signs(x: Tensor) -> Tensor:
    """Return 1 for x >= 0, else -1, in x's type; NaN gives -1."""
    return x.ge(0.0).to(x.dtype).mul_(2.0).sub_(1.0)


@explained
def pot_quantize(
    x: Tensor,
    alpha: Tensor | float,
    n_bits: int,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to `+-alpha * 2**i`, i = 0 .. 2**(n_bits - 1) - 1, the nearest in value.

    x: (*) float. alpha: () or broadcastable to x, >= 0, same unit as x. Returns (*). Raises ConfigError.
    Assigning by value and not by logarithm saves 0.7 to 9 % of the squared error (docs/algorithms.md A5).

    >>> pot_quantize(torch.tensor([-0.2, 1.4, 1.6, 99.0]), 1.0, 3)
    tensor([-1.,  1.,  2.,  8.])
    """
    check_pot(n_bits)
    return apply_projection(x, PowersOfTwo(alpha, n_bits).project, gradient, clamp)


def pot_encode(magnitudes: Tensor, negative: Tensor) -> Tensor:
    """Return codes: i for a positive value, -1 - i for a negative one; they rise with the value. int32."""
    exponents = magnitudes.log2().round().to(torch.int32)
    return torch.where(negative, -1 - exponents, exponents)


def pot_decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the unscaled values of `codes`; the inverse of `pot_encode`."""
    is_negative = codes < 0
    magnitude = pow2(torch.where(is_negative, -1 - codes, codes), dtype)
    return torch.where(is_negative, -magnitude, magnitude)


@dataclass(frozen=True, eq=False)
class PowersOfTwo(ScaledFormat):
    """{+-scale 2**i}, i = 0 .. 2**(n_bits - 1) - 1. Codes: see `pot_encode`."""

    n_bits: int

    @property
    def code_range(self) -> tuple[int, int]:
        return integer_codes(self.n_bits, True)

    @property
    def largest(self) -> float:
        return pot_max(self.n_bits)

    def kernel(self) -> KernelCall | None:
        return "powers_of_two", (self.scale,), (self.largest,)

    def codes(self, x: Tensor) -> Tensor:
        return pot_encode(pot_magnitudes(x, self.shaped(self.scale, x), self.n_bits), x < 0)

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return pot_decode(codes.to(torch.int32), dtype)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; x counts as clipped beyond the largest level."""
        scale = self.shaped(self.scale, x)
        value = pot_magnitudes(x, scale, self.n_bits).mul_(signs(x)).mul_(scale)
        return value, x.abs().le_(scale * self.largest) if want_inside else None
