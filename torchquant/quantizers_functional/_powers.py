"""Exact powers of two from the bits of a float: no log, no pow, no rounding, fast on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers_functional._gradient import is_traced

# float type -> (integer type of the same width, exponent mask, fraction bits, exponent bias)
_LAYOUT = {
    torch.float32: (torch.int32, 0x7F800000, 23, 127),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52, 1023),
}


def _bits_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret the bits as another type. `torch.jit.trace` supports no such view; its graphs get a copy."""
    return torch.view_copy(x, dtype=dtype) if is_traced() else x.view(dtype)


def floor_pow2(x: Tensor) -> Tensor:
    """Return the largest power of two not above |x|, for normal x; 0 for zero and subnormal x.

    x: (*) float32 or float64. NaN and Inf give Inf.

    >>> floor_pow2(torch.tensor([0.3, -4.0, 7.9]))
    tensor([0.2500, 4.0000, 4.0000])
    """
    integer, exponent_mask, _, _ = _LAYOUT[x.dtype]
    return _bits_as(_bits_as(x, integer).bitwise_and(exponent_mask), x.dtype)


def pow2(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute 2**exponent exactly. exponent: (*) integers; clamped to the normal numbers of `dtype`.

    >>> pow2(torch.tensor([-3, 0, 5]), torch.float32)
    tensor([ 0.1250,  1.0000, 32.0000])
    """
    integer, _, fraction_bits, bias = _LAYOUT[dtype]
    biased = exponent.to(integer).clamp(1 - bias, bias) + bias
    return _bits_as(biased << fraction_bits, dtype)


def ceil_log2(x: Tensor) -> Tensor:
    """Return the smallest integer m with x <= 2**m, int64. x: (*) float32 or float64, normal and > 0.

    >>> ceil_log2(torch.tensor([0.5, 0.6, 1.0, 3.0]))
    tensor([-1,  0,  0,  2])
    """
    integer, exponent_mask, fraction_bits, bias = _LAYOUT[x.dtype]
    bits = _bits_as(x, integer)
    exponent = (bits.bitwise_and(exponent_mask) >> fraction_bits) - bias
    has_fraction = bits.bitwise_and((1 << fraction_bits) - 1).ne(0)
    return exponent.to(torch.int64) + has_fraction
