"""Q-format (fixed point): a uniform grid whose step is a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional._powers import ceil_log2, pow2
from torchquant.quantizers_functional.affine import AffineParams
from torchquant.quantizers_functional.uniform import Bound, integer_codes, uniform_quantize

RULES = ("nosat", "sat", "mse")
MAX_BITS = 24


def check_qfmt(n_bits: int, signed: bool, rule: str) -> None:
    """Raise ConfigError unless the three name a format of docs/algorithms.md A2."""
    if not (isinstance(n_bits, int) and 1 <= n_bits <= MAX_BITS):
        raise ConfigError(f"n_bits must be a whole number from 1 to {MAX_BITS}, got {n_bits!r}")
    if not isinstance(signed, bool):
        raise ConfigError(f"signed must be True or False, got {signed!r}")
    if rule not in RULES:
        raise ConfigError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


@explained
def qfmt_int_bits(range_min: Tensor, range_max: Tensor, n_bits: int, signed: bool, rule: str = "nosat") -> Tensor:
    """Compute the integer bits m of the Q-format that covers the range. () or (C,) in, int64 of that shape out.

    `rule="nosat"`: the smallest m whose clipping error never exceeds the rounding error. Two's
    complement reaches -2**m exactly but only 2**m - delta on top, so the ends need different rules:
    `ceil(log2)` below, and one more bit above when the top would clip by more than half a step.
    `rule="sat"`: plain `ceil(log2(absmax))`, one more bit of resolution at an exact power of two.

    Source: docs/algorithms.md A2. The published torchquant rule (`floor(log2 absmax) + 1`) wastes a bit at
    range_min = -2**k. A range of zeros gives m = 0; ranges stop at a quarter of the largest float, so
    that no grid value overflows.

    >>> qfmt_int_bits(torch.tensor(-1.0), torch.tensor(0.5), 8, signed=True)
    tensor(0)
    >>> qfmt_int_bits(torch.tensor(-1.0), torch.tensor(1.0), 8, signed=True)
    tensor(1)
    """
    check_qfmt(n_bits, signed, rule)
    info = torch.finfo(range_max.dtype)
    below, above = (-range_min).clamp(info.tiny, info.max / 4), range_max.clamp(info.tiny, info.max / 4)
    m_below, m_above = ceil_log2(below), ceil_log2(above)
    if rule != "sat":
        half_step_bits = n_bits if signed else n_bits + 1
        top = pow2(m_above, range_max.dtype) * (1.0 - 2.0**-half_step_bits)
        m_above = m_above + (above > top)
    lowest = torch.full_like(m_above, -(2**15))
    m_above = torch.where(range_max > 0, m_above, lowest)
    m_below = torch.where(range_min < 0, m_below, lowest) if signed else lowest
    m = torch.maximum(m_below, m_above)
    return torch.where(m == lowest, torch.zeros_like(m), m)


@explained
def qfmt_params(int_bits: Tensor, n_bits: int, signed: bool, dtype: torch.dtype) -> AffineParams:
    """Compute step and code bounds of Q(int_bits, n_bits - int_bits - signed). Codes are always n_bits wide.

    >>> qfmt_params(torch.tensor(1), 8, True, torch.float32)
    AffineParams(delta=tensor(0.0156), zero_point=0, qmin=-128, qmax=127)
    """
    codes = integer_codes(n_bits, signed)
    return AffineParams(pow2(int_bits + int(signed) - n_bits, dtype), 0, *codes)


@explained
def qfmt_quantize(
    x: Tensor,
    delta: Tensor | float,
    min_int: Bound,
    max_int: Bound,
    gradient: str = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to `delta * clamp(RHE(x / delta), min_int, max_int)`.

    x: (*) float. delta: () or broadcastable to x, a power of two, same unit as x. min_int, max_int:
    code bounds, e.g. -128 and 127 for signed 8 bits whatever delta is. Returns (*), as x.
    `gradient` and `clamp` as in `affine_quantize`. Source: docs/algorithms.md A2.

    >>> qfmt_quantize(torch.tensor([-1.0, 1.0, 0.26]), 2.0**-6, -128, 127)
    tensor([-1.0000,  1.0000,  0.2656])
    """
    return uniform_quantize(x, delta, min_int, max_int, gradient, clamp)
