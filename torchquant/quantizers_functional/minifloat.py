"""Mini-floats: sign, exponent, fraction, subnormals; saturating. docs/algorithms.md A11."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient, Projection, apply_projection
from torchquant.quantizers_functional._powers import floor_pow2, pow2
from torchquant.quantizers_functional.uniform import like

SPECIAL = ("none", "fn", "ieee", "fnuz")


@checked
@dataclass(frozen=True)
class FloatFormat:
    """Widths of exponent and fraction, bias, and which codes are not numbers.

    `special`: "none", all codes are numbers; "fn", only the all-ones code is NaN (OCP E4M3); "ieee", the
    highest exponent is Inf and NaN (E5M2); "fnuz", only the code of -0 is NaN. `bias` None is
    `2**(exponent_bits - 1) - 1`, one more for "fnuz". Raises ConfigError.

    >>> FloatFormat(4, 3, special="fn").largest
    448.0
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    special: str = "none"

    def __post_init__(self) -> None:
        if self.special not in SPECIAL:
            raise ConfigError(f"special must be one of {', '.join(SPECIAL)}, got {self.special!r}")
        e, m = self.exponent_bits, self.mantissa_bits
        if not (isinstance(e, int) and isinstance(m, int) and 1 <= e <= 5 and 0 <= m <= 10):
            raise ConfigError(f"a mini-float has 1..5 exponent bits and 0..10 fraction bits, got ({e!r}, {m!r})")
        if self.largest_code < 1:
            raise ConfigError(f"({e}, {m}) with special={self.special!r} has no number but 0")

    @property
    def offset(self) -> int:
        """The bias of the exponent."""
        return int(2 ** (self.exponent_bits - 1) - 1 + (self.special == "fnuz")) if self.bias is None else self.bias

    @property
    def n_bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def largest_code(self) -> int:
        """Bits `exponent . fraction` of the largest number."""
        n_codes = int(2 ** (self.exponent_bits + self.mantissa_bits))
        return n_codes - 1 - {"none": 0, "fnuz": 0, "fn": 1, "ieee": int(2**self.mantissa_bits)}[self.special]

    @property
    def largest(self) -> float:
        """Largest number."""
        code, fractions = self.largest_code, 2**self.mantissa_bits
        exponent, fraction = divmod(code, fractions)
        significand = fraction / fractions + (exponent > 0)
        return float(significand * 2.0 ** (max(exponent, 1) - self.offset))


FORMATS = {
    "fp4_e2m1": FloatFormat(2, 1),
    "fp6_e2m3": FloatFormat(2, 3),
    "fp6_e3m2": FloatFormat(3, 2),
    "fp8_e4m3": FloatFormat(4, 3, special="fn"),
    "fp8_e5m2": FloatFormat(5, 2, special="ieee"),
    "fp8_e3m4": FloatFormat(3, 4),
    "fp8_e4m3fnuz": FloatFormat(4, 3, special="fnuz"),
    "fp8_e5m2fnuz": FloatFormat(5, 2, special="fnuz"),
}


def nearest_floats(x: Tensor, form: FloatFormat) -> Tensor:
    """Nearest number of the format, ties to even, saturating; NaN stays NaN. x: (*) float32 or float64."""
    smallest_normal = 2.0 ** (1 - form.offset)
    spacing = floor_pow2(x).clamp_(smallest_normal, form.largest).mul_(2.0**-form.mantissa_bits)
    spacing = torch.where(spacing.isfinite(), spacing, torch.ones_like(spacing))
    return torch.div(x, spacing).round_().mul_(spacing).clamp_(-form.largest, form.largest)


def minifloat_projection(scale: Tensor | float, form: FloatFormat) -> Projection:
    """Projection on `scale` times the format; `inside` is 1 where |x| <= scale * largest."""

    def project(real: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        unit = like(scale, real)
        value = nearest_floats(real / unit, form).mul_(unit)
        return value, real.abs().le_(unit * form.largest) if want_inside else None

    return project


@explained
def minifloat_quantize(
    x: Tensor,
    scale: Tensor | float,
    form: FloatFormat,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to `scale` times the nearest number of the format.

    x: (*) float. scale: () or broadcastable to x, > 0, same unit as x. Returns (*).

    >>> minifloat_quantize(torch.tensor([0.75, 1.25, 2.5, 99.0]), 1.0, FORMATS["fp4_e2m1"])
    tensor([1., 1., 2., 6.])
    """
    return apply_projection(x, minifloat_projection(scale, form), gradient, clamp)


def minifloat_encode(values: Tensor, form: FloatFormat) -> Tensor:
    """Codes of unscaled numbers of the format: sign times the bits `exponent . fraction`. int32, monotone."""
    magnitude = values.abs()
    fractions = 2**form.mantissa_bits
    smallest_normal = 2.0 ** (1 - form.offset)
    binade = floor_pow2(magnitude).clamp_min(smallest_normal)
    # Normal numbers: (E << m) + F; below the smallest one E is 0 and there is no hidden bit.
    exponent = (binade.log2().round() + (form.offset - 1)).to(torch.int32)
    significand = (magnitude / binade * fractions).to(torch.int32)
    return (exponent * fractions + significand) * values.sign().to(torch.int32)


def minifloat_decode(codes: Tensor, form: FloatFormat, dtype: torch.dtype) -> Tensor:
    """Unscaled numbers of `codes`; the inverse of `minifloat_encode`."""
    magnitude = codes.abs().to(torch.int64)
    fractions = 2**form.mantissa_bits
    exponent = (torch.div(magnitude, fractions, rounding_mode="floor") - 1).clamp_min(0)
    significand = (magnitude - exponent * fractions).to(dtype) / fractions
    return significand * pow2(exponent + (1 - form.offset), dtype) * codes.sign().to(dtype)


def minifloat_bits(codes: Tensor, form: FloatFormat) -> Tensor:
    """The stored bit patterns of signed codes: the sign in the top bit. (*) int32 -> (*) int32.

    -0 has no code and so no pattern here; NaN and Inf neither.

    >>> minifloat_bits(torch.tensor([-1, 0, 7]), FORMATS["fp4_e2m1"])
    tensor([9, 0, 7])
    """
    return codes.abs() + (codes < 0).to(codes.dtype) * 2 ** (form.n_bits - 1)
