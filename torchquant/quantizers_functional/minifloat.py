"""Mini-floats: sign, exponent, fraction, subnormals; saturating. docs/algorithms.md A11."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection
from torchquant.quantizers_functional._powers import floor_pow2, pow2
from torchquant.quantizers_functional.formats import KernelCall, ScaledFormat

SPECIAL = ("none", "fn", "ieee", "fnuz")


@checked
@dataclass(frozen=True)
class FloatFormat:
    """A mini-float format: widths of exponent and fraction, bias, and which codes are not numbers.

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
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code: sign times the bits `exponent . fraction`."""
        return -self.largest_code, self.largest_code

    @property
    def smallest_normal(self) -> float:
        """Smallest number with a hidden bit; below it the numbers are equally spaced."""
        return float(2.0 ** (1 - self.offset))

    @property
    def largest_power(self) -> float:
        """Largest power of two among the numbers, the start of the binade of the largest number."""
        return float(2.0 ** (max(self.largest_code // 2**self.mantissa_bits, 1) - self.offset))

    @property
    def largest(self) -> float:
        """Largest number."""
        exponent, fraction = divmod(self.largest_code, 2**self.mantissa_bits)
        return float((fraction / 2**self.mantissa_bits + (exponent > 0)) * self.largest_power)


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
    """Round to the nearest number, ties to even, saturating; NaN stays NaN. x: (*) float32 or float64."""
    return nearest_floats_(x.clone(), form)


def nearest_floats_(x: Tensor, form: FloatFormat) -> Tensor:
    """Do `nearest_floats` in place."""
    spacing = floor_pow2(x).clamp_(form.smallest_normal, form.largest_power).mul_(2.0**-form.mantissa_bits)
    return x.div_(spacing).round_().mul_(spacing).clamp_(-form.largest, form.largest)


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
    return apply_projection(x, ScaledFloat(scale, form).project, gradient, clamp)


def minifloat_encode(values: Tensor, form: FloatFormat) -> Tensor:
    """Return codes of unscaled numbers of the format: sign times the bits `exponent . fraction`. int32, monotone."""
    magnitude = values.abs()
    fractions = 2**form.mantissa_bits
    binade = floor_pow2(magnitude).clamp_min(form.smallest_normal)
    # Normal numbers: (E << m) + F; below the smallest one E is 0 and there is no hidden bit.
    exponent = (binade.log2().round() + (form.offset - 1)).to(torch.int32)
    significand = (magnitude / binade * fractions).to(torch.int32)
    return (exponent * fractions + significand) * values.sign().to(torch.int32)


def minifloat_decode(codes: Tensor, form: FloatFormat, dtype: torch.dtype) -> Tensor:
    """Return the unscaled numbers of `codes`; the inverse of `minifloat_encode`."""
    magnitude = codes.abs().to(torch.int64)
    fractions = 2**form.mantissa_bits
    exponent = (torch.div(magnitude, fractions, rounding_mode="floor") - 1).clamp_min(0)
    significand = (magnitude - exponent * fractions).to(dtype) / fractions
    return significand * pow2(exponent + (1 - form.offset), dtype) * codes.sign().to(dtype)


def minifloat_bits(codes: Tensor, form: FloatFormat) -> Tensor:
    """Return the stored bit patterns of signed codes: the sign in the top bit. (*) int32 -> (*) int32.

    -0, NaN and Inf have no code and so no pattern here.

    >>> minifloat_bits(torch.tensor([-1, 0, 7]), FORMATS["fp4_e2m1"])
    tensor([9, 0, 7])
    """
    return codes.abs() + (codes < 0).to(codes.dtype) * 2 ** (form.n_bits - 1)


@dataclass(frozen=True, eq=False)
class ScaledFloat(ScaledFormat):
    """Floating-point numbers of few bits times a scale: FP8, FP4, ESB, powers of two with zero.

    >>> ScaledFloat(0.5, FORMATS["fp4_e2m1"]).levels()[7:]
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000, 1.5000, 2.0000, 3.0000])
    """

    form: FloatFormat

    @property
    def code_range(self) -> tuple[int, int]:
        return self.form.code_range

    @property
    def largest(self) -> float:
        return self.form.largest

    def kernel(self) -> KernelCall | None:
        form = self.form
        spacing = 2.0**-form.mantissa_bits
        if form.smallest_normal * spacing < 2.0**-126 or form.largest_power * spacing > 2.0**126:
            return None
        constants = form.smallest_normal, form.largest_power, spacing, form.largest
        if self.shift is None:
            return "floats", (self.scale,), constants
        return "shifted_floats", (self.scale, self.shift), constants

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return minifloat_decode(codes, self.form, dtype)

    def _centred(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x - self.shaped(self.shift, x)

    def codes(self, x: Tensor) -> Tensor:
        return minifloat_encode(nearest_floats_(self._centred(x) / self.shaped(self.scale, x), self.form), self.form)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; x counts as clipped beyond the largest number."""
        centred, scale = self._centred(x), self.shaped(self.scale, x)
        value = nearest_floats_(centred / scale, self.form).mul_(scale)
        value = value if self.shift is None else value.add_(self.shaped(self.shift, x))
        return value, centred.abs().le_(scale * self.largest) if want_inside else None
