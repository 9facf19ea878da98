"""Mini-float quantizers: FP8, FP6, FP4 and any other. Maths: quantizers_functional/minifloat.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._powers import ceil_log2, pow2
from torchquant.quantizers_functional._row_statistics import row_sums, unit_rows, usable_scale
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.minifloat import (
    FORMATS,
    FloatFormat,
    ScaledFloat,
    nearest_floats_,
)
from torchquant.range_observers._distributed import reduce_max, reduce_sum
from torchquant.range_observers._statistics import rows

SCALES = ("absmax", "pow2", "one", "mse")
MSE_STEPS = 24
"""Eighths of a binade below the largest magnitude that "mse" tries."""


def _preset(form: FloatFormat) -> dict[str, Any]:
    widths = {"exponent_bits": form.exponent_bits, "mantissa_bits": form.mantissa_bits}
    return {"n_bits": form.n_bits, **widths, "special": form.special}


@QUANTIZERS.register("minifloat")
class MinifloatQuantizer(ScaledQuantizer):
    """Floating point of few bits, with subnormals, saturating (OCP FP8 and MX, IEEE 754; docs/algorithms.md A11).

    `exponent_bits` 1..5, `mantissa_bits` 0..10, `n_bits` their sum and the sign; `bias`, `special`: see
    `FloatFormat`. `scale` makes the format's numbers fit: "absmax" puts the largest magnitude on the largest number,
    "pow2" the same rounded up to a power of two, "one" leaves them, "mse" searches up to three binades below "absmax"
    for the least squared error. Raises ConfigError.

    >>> quantizer = MinifloatQuantizer(8, 4, 3, special="fn")
    >>> quantizer.pre_observe(torch.tensor([-448.0, 1.06]))
    >>> quantizer(torch.tensor([-448.0, 1.06]))
    tensor([-448.,    1.])
    """

    statistics = ("unit",)
    joined_by = {"unit": "max"}
    own_rule = ("scale", "absmax")
    scale_of_zeros = 1.0
    short_names = {"e": "exponent_bits", "m": "mantissa_bits"}
    presets = {name: _preset(form) for name, form in FORMATS.items()}
    about = About("scale * nearest of +-(1 + F 2**-m) 2**(E - bias) and subnormals", "OCP OFP8 and MX v1.0", "3..16")

    def __init__(
        self,
        n_bits: int,
        exponent_bits: int,
        mantissa_bits: int,
        bias: int | None = None,
        special: str = "none",
        scale: str = "absmax",
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        form = FloatFormat(exponent_bits, mantissa_bits, bias, special)
        if n_bits != form.n_bits:
            parts = f"1 sign, {exponent_bits} exponent and {mantissa_bits} fraction bits"
            raise ConfigError(f"{parts} are {form.n_bits} bits, not {n_bits}")
        if scale not in SCALES:
            raise ConfigError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.n_bits = n_bits
        self.form = form
        self.scale = scale

    @property
    def code_range(self) -> tuple[int, int]:
        return self.form.code_range

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        absmax = reduce_max(rows(x, self.axis).abs().amax(1))
        fitting = absmax.to(torch.float64) / self.form.largest
        if self.scale == "one":
            fitting = torch.where(absmax.isfinite(), torch.ones_like(fitting), fitting)
        elif self.scale == "pow2":
            exponent = ceil_log2(torch.where(fitting > 0, fitting, torch.ones_like(fitting)))
            fitting = torch.where(fitting.isfinite(), pow2(exponent, torch.float64), fitting)
        scale = usable_scale(fitting, self.form.largest)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        if self.scale == "mse":
            scale = self._least_error(rows(x, self.axis), scale)
        return (scale if self.axis is not None else scale.squeeze(0),)

    def _least_error(self, x: Tensor, largest: Tensor) -> Tensor:
        units, unit = unit_rows(x)
        errors, scales = [], [largest * 2.0 ** (-i / 8) for i in range(MSE_STEPS + 1)]
        for scale in scales:
            relative = (scale / unit).to(units.dtype)[:, None]
            error = nearest_floats_(units / relative, self.form).mul_(relative).sub_(units)
            errors.append(row_sums(error.square_()) * unit.to(torch.float64).square())
        best_error, best = torch.full_like(largest, torch.inf), largest
        for scale, error in zip(scales, reduce_sum(torch.stack(errors)), strict=True):
            best, best_error = torch.where(error < best_error, scale, best), torch.minimum(error, best_error)
        return best

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        (scale,) = numbers
        return ScaledFloat(scale, self.form, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[MinifloatQuantizer]:
        """Return the instances on which the laws are checked."""
        fp8 = FORMATS["fp8_e4m3"]
        return [
            cls(8, fp8.exponent_bits, fp8.mantissa_bits, special=fp8.special, axis=axis, gradient_clip=True),
            cls(4, 2, 1, scale="pow2", axis=axis),
            cls(6, 3, 2, axis=axis),
            cls(4, 2, 1, scale="mse", axis=axis),
        ]

    def extra_repr(self) -> str:
        return f"{self.form}, scale={self.scale!r}, {super().extra_repr()}"
