"""Per-token granularity: a symmetric grid for each row of the last axis, computed from the row itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional.formats import OwnLevels, UniformGrid

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, torch.finfo(torch.bfloat16).max


def check_token_bits(n_bits: int) -> None:
    """Raise ConfigError for widths other than 2..8."""
    if not (isinstance(n_bits, int) and not isinstance(n_bits, bool) and 2 <= n_bits <= 8):
        raise ConfigError(f"n_bits must be 2..8, got {n_bits!r}")


def largest_code(n_bits: int) -> int:
    """Return the largest code; the smallest is its negative."""
    return int(2 ** (n_bits - 1)) - 1


def token_scales(x: Tensor, n_bits: int) -> Tensor:
    """Compute the step of each row, `max|x| / largest_code`, rounded to a bfloat16; in the type of x, (..., 1).

    With its eight bits of mantissa, steps times codes are exact in float32. Infinite elements and NaN do not count.
    """
    if x.ndim and not x.shape[-1]:
        return x.new_ones((*x.shape[:-1], 1))
    size = x.abs()
    largest = torch.where(size < torch.inf, size, 0.0).amax(-1, keepdim=True)
    scale = (largest / largest_code(n_bits)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return scale.to(torch.bfloat16).to(x.dtype)


def token_steps(x: Tensor, scale: Tensor, n_bits: int) -> Tensor:
    """Compute `clamp(RHE(x / scale))`, integers in the type of x; NaN stays NaN."""
    end = largest_code(n_bits)
    return torch.round(x / scale).clamp(-end, end)


def token_codes(x: Tensor, n_bits: int) -> Tensor:
    """Return self-contained codes: the 16 bits of the row's scale above the n_bits of the element, int32."""
    scale = token_scales(x, n_bits)
    steps = token_steps(x, scale, n_bits).to(torch.int32) + largest_code(n_bits)
    return scale.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32) * 2**n_bits + steps


def token_values(codes: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    """Return the grid values of the codes of `token_codes`, in `dtype`."""
    codes = codes.to(torch.int32)
    scale = (codes >> n_bits).to(torch.int16).contiguous().view(torch.bfloat16).to(dtype)
    return ((codes & (2**n_bits - 1)) - largest_code(n_bits)).to(dtype) * scale


@dataclass(frozen=True, eq=False)
class TokenGrid(OwnLevels):
    """A symmetric grid for each row of the last axis, over the largest magnitude in it. Codes: see `token_codes`."""

    n_bits: int

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, int(2 ** (self.n_bits + 15)) - 1

    def codes(self, x: Tensor) -> Tensor:
        return token_codes(x, self.n_bits)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return token_values(codes, self.n_bits, dtype)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        end = largest_code(self.n_bits)
        return UniformGrid(token_scales(x, self.n_bits), 0, -end, end).neighbours(x)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; nothing is clipped, since the scale covers the token."""
        scale = token_scales(x, self.n_bits)
        return token_steps(x, scale, self.n_bits) * scale, None
