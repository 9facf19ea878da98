"""Map integer sums to integer codes: the multiplications of integer-only inference (arXiv:1712.05877, section 2.2).

`rounding` names one of four arithmetics:

| name | computes | ties |
|---|---|---|
| exact | `acc * M`, M in float64 | half to even |
| ort | float32 of acc times float32 of M, as ONNX Runtime's integer kernels | half to even |
| single | `(acc * M0 + 2**(30 - e)) >> (31 - e)` in 64-bit integers, TFLite's single rounding | half up |
| double | saturating doubling high multiply, then rounding shift: gemmlowp, TFLite's classic kernels | away from 0 |

with `M = M0 * 2**(e - 31)` and M0 a 32-bit integer. All functions are maps of tensors, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant.errors import ConfigError

ROUNDINGS = ("ort", "exact", "single", "double")
INT32_MAX = 2**31 - 1
ADD_SHIFT = 20
"""Number of bits by which fixed point shifts up both inputs of an addition, as TFLite does for 8-bit codes."""


def check_rounding(rounding: str) -> str:
    """Return the name if there is such an arithmetic. Raises ConfigError."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    return rounding


def fixed_point(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M0, e), int64: `multiplier` is nearly `M0 * 2**(e - 31)`, 2**30 <= M0 < 2**31. Raises ConfigError.

    multiplier: float64 > 0 and finite. Relative error at most 2**-31.

    >>> [int(part) for part in fixed_point(torch.tensor(0.25, dtype=torch.float64))]
    [1073741824, -1]
    """
    if not bool((multiplier.isfinite() & (multiplier > 0)).all()):
        raise ConfigError(f"a multiplier must be above 0 and finite, got {multiplier.flatten().tolist()[:8]}")
    fraction, exponent = torch.frexp(multiplier)
    mantissa = torch.floor(fraction * 2.0**31 + 0.5).to(torch.int64)
    full = mantissa == 2**31
    return torch.where(full, mantissa // 2, mantissa), exponent.to(torch.int64) + full


def requantize(acc: Tensor, multiplier: Tensor, rounding: str) -> Tensor:
    """Round `acc * multiplier` to integers (int64) by one of `ROUNDINGS`.

    acc: (*) int64 within int32. multiplier: float64 > 0 that broadcasts against it. Raises ConfigError.

    >>> acc, quarter = torch.tensor([2, 6, -2, -6]), torch.tensor(0.25, dtype=torch.float64)
    >>> [requantize(acc, quarter, r).tolist() for r in ("exact", "single", "double")]
    [[0, 2, 0, -2], [1, 2, 0, -1], [1, 2, -1, -2]]
    """
    if check_rounding(rounding) == "ort":
        return torch.round(acc.to(torch.float32) * multiplier.to(torch.float32)).to(torch.int64)
    if rounding == "exact":
        return torch.round(acc.to(torch.float64) * multiplier).to(torch.int64)
    m0, exponent = fixed_point(multiplier)
    if rounding == "single":
        shift = 31 - exponent
        tiny = shift > 62  # |acc * M0| < 2**62, so the result is 0
        shift = torch.where(tiny, 62, shift)
        shifted = (acc * m0 + (torch.ones_like(shift) << (shift - 1))) >> shift
        return torch.where(tiny, 0, shifted)
    raised = acc << exponent.clamp_min(0)
    return _rounding_shift(_doubling_high_multiply(raised, m0), (-exponent).clamp_min(0))


def _doubling_high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Compute gemmlowp's SaturatingRoundingDoublingHighMul: `a * b / 2**31`, halves upwards."""
    product = a.clamp(-INT32_MAX - 1, INT32_MAX) * b
    nudge = torch.where(product >= 0, 2**30, 1 - 2**30)
    return torch.div(product + nudge, 2**31, rounding_mode="trunc").clamp_max(INT32_MAX)


def _rounding_shift(x: Tensor, shift: Tensor) -> Tensor:
    """Compute gemmlowp's RoundingDivideByPOT: `x / 2**shift`, halves away from 0."""
    shift = shift.clamp_max(62)
    mask = (torch.ones_like(shift) << shift) - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> shift) + ((x & mask) > threshold)


def requantize_sum(
    terms: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor, zero_point: Tensor, rounding: str
) -> Tensor:
    """Compute the codes (int64, not yet clamped) of a sum of two quantized tensors on another grid.

    terms: two of (codes int64, scale, zero point); `scale` and `zero_point` are the result's. Scales
    are float64 holding float32 values. ort: as ONNX Runtime's x86-64 addition, in float32 with fused
    multiply-adds, zero point added before rounding; its ARM kernel differs. single, double: TFLite's
    addition, both inputs shifted up by 20 bits and brought to a common scale.
    """
    (a, scale_a, zero_a), (b, scale_b, zero_b) = terms
    if check_rounding(rounding) == "ort":
        ratio_a, ratio_b = (_float32_ratio(s, scale) for s in (scale_a, scale_b))
        offset = _fused(ratio_a, zero_a, _float32(ratio_b * zero_b))
        fixed = _float32(zero_point - offset)
        return torch.round(_fused(a, ratio_a, _fused(b, ratio_b, fixed))).to(torch.int64)
    if rounding == "exact":
        real = (a - zero_a) * scale_a + (b - zero_b) * scale_b  # exact, so that there is one rounding before the last
        return torch.round(real / scale).to(torch.int64) + zero_point
    common = 2.0 * torch.maximum(scale_a, scale_b)
    parts = [
        requantize((codes - zero) << ADD_SHIFT, s / common, rounding)
        for codes, s, zero in ((a, scale_a, zero_a), (b, scale_b, zero_b))
    ]
    return requantize(parts[0] + parts[1], common / (scale * 2.0**ADD_SHIFT), rounding) + zero_point


def requantize_product(acc: Tensor, multiplier: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
    """Compute the codes (int64, not yet clamped) of an elementwise product; ort adds the zero point before rounding."""
    if check_rounding(rounding) == "ort":
        scaled = acc.to(torch.float32) * multiplier.to(torch.float32)
        return torch.round(scaled + zero_point.to(torch.float32)).to(torch.int64)
    return requantize(acc, multiplier, rounding) + zero_point


def multiplier_of(scale: Tensor, divisor: int, output_scale: Tensor, rounding: str) -> Tensor:
    """Compute `scale / (divisor * output_scale)` in float64; for ort in float32, in the order of its kernels.

    scale: float64, of an accumulator: exact as the product of two float32 scales.
    """
    if rounding == "ort":
        divided = output_scale.to(torch.float32) * divisor
        return (scale.to(torch.float32) / divided).to(torch.float64)
    return scale / (output_scale.to(torch.float64) * divisor)


def _float32(x: Tensor) -> Tensor:
    """Round to float32, held in float64."""
    return x.to(torch.float32).to(torch.float64)


def _float32_ratio(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.float32) / b.to(torch.float32)).to(torch.float64)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute `a * b + c` rounded once to float32; the product of two float32 numbers is exact in float64."""
    return _float32(a.to(torch.float64) * b.to(torch.float64) + c.to(torch.float64))
