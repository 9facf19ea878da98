"""The values that an `IntegerTensor` carries: integers with a scale, and results computed from them.

Each has `real()`, float32 as from a DequantizeLinear; `exact()`, the number in float64; and `on_grid()`, its codes on
a grid, not yet clamped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchquant.quantizers_functional.requantize import (
    multiplier_of,
    requantize,
    requantize_product,
    requantize_sum,
)

GUARD_BITS = 8
"""Fraction bits that the parts of a sum with several scales keep in fixed point."""


@dataclass(frozen=True)
class Codes:
    """A tensor on a uniform grid: real = ints * scale, ints = code - zero_point, |ints| <= limit.

    ints: int64. scale (float64 holding float32) and zero_point (int64): () or shaped to broadcast against ints.
    `site`: the quantizer that made it.
    """

    ints: Tensor
    scale: Tensor
    zero_point: Tensor
    limit: int
    site: str

    def real(self) -> Tensor:
        return self.ints.to(torch.float32) * self.scale.to(torch.float32)

    def exact(self) -> Tensor:
        return self.ints * self.scale

    def codes(self) -> Tensor:
        return self.ints + self.zero_point

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        if rounding == "ort":  # a DequantizeLinear and a QuantizeLinear
            return _by_float(self.real(), scale, zero_point)
        return requantize(self.ints, multiplier_of(self.scale, 1, scale, rounding), rounding) + zero_point


@dataclass(frozen=True)
class Sum:
    """Sums of products: real = ints * scale / divisor. scale: float64, the exact product of two float32 scales."""

    ints: Tensor
    scale: Tensor
    divisor: int = 1

    def real(self) -> Tensor:
        return self.ints.to(torch.float32) * (self.scale.to(torch.float32) / self.divisor)

    def exact(self) -> Tensor:
        return self.ints * self.scale / self.divisor

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        return requantize(self.ints, multiplier_of(self.scale, self.divisor, scale, rounding), rounding) + zero_point


@dataclass(frozen=True)
class Sums:
    """A sum of several `Sum`s with different scales, as weights with several integer terms give."""

    parts: tuple[Sum, ...]

    def real(self) -> Tensor:
        return self.exact().to(torch.float32)

    def exact(self) -> Tensor:
        total = self.parts[0].exact()
        for part in self.parts[1:]:
            total = total + part.exact()
        return total

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        if rounding in ("ort", "exact"):  # no runtime has a kernel for it
            ratios = [part.ints.to(torch.float64) * (part.scale / scale) for part in self.parts]
            return torch.round(torch.stack(torch.broadcast_tensors(*ratios)).sum(0)).to(torch.int64) + zero_point
        raised = [_signed(part.ints, part.scale / scale * 2.0**GUARD_BITS, rounding) for part in self.parts]
        total = torch.stack(torch.broadcast_tensors(*raised)).sum(0)
        return requantize(total, torch.tensor(2.0**-GUARD_BITS, dtype=torch.float64), rounding) + zero_point


@dataclass(frozen=True)
class Product(Sum):
    """An elementwise product of two tensors on grids."""

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        multiplier = multiplier_of(self.scale, self.divisor, scale, rounding)
        return requantize_product(self.ints, multiplier, zero_point, rounding)


@dataclass(frozen=True)
class Addition:
    """The sum of two tensors on grids, or their difference."""

    a: Codes
    b: Codes
    minus: bool = False

    def real(self) -> Tensor:
        return self.a.real() - self.b.real() if self.minus else self.a.real() + self.b.real()

    def exact(self) -> Tensor:
        return self.a.exact() - self.b.exact() if self.minus else self.a.exact() + self.b.exact()

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        if self.minus and rounding == "ort":  # ONNX Runtime has no integer subtraction
            return _by_float(self.real(), scale, zero_point)
        b = replace(self.b, ints=-self.b.ints, zero_point=torch.zeros_like(self.b.zero_point)) if self.minus else self.b
        terms = [(value.codes(), value.scale, value.zero_point) for value in (self.a, b)]
        return requantize_sum(terms, scale, zero_point, rounding)


@dataclass(frozen=True)
class Average(Sum):
    """Means over windows. `in_float` computes them as ONNX Runtime's AveragePool does, one addition after another."""

    in_float: Callable[[], Tensor] | None = None

    def real(self) -> Tensor:
        return super().real() if self.in_float is None else self.in_float()

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        if rounding == "ort" and self.in_float is not None:
            scaled = self.in_float() / scale.to(torch.float32)
            return torch.round(scaled + zero_point.to(torch.float32)).to(torch.int64)
        return super().on_grid(scale, zero_point, rounding)


@dataclass(frozen=True)
class Concat:
    """The concatenation of tensors on different grids along `dim`."""

    parts: tuple[Codes, ...]
    dim: int

    def real(self) -> Tensor:
        return torch.cat([part.real() for part in self.parts], self.dim)

    def exact(self) -> Tensor:
        return torch.cat([part.exact() for part in self.parts], self.dim)

    def on_grid(self, scale: Tensor, zero_point: Tensor, rounding: str) -> Tensor:
        return torch.cat([part.on_grid(scale, zero_point, rounding) for part in self.parts], self.dim)


@dataclass(frozen=True)
class Weight:
    """A weight in integers: terms (scale () or one per output channel, ints in the layout of the layer)."""

    terms: tuple[tuple[Tensor, Tensor], ...]
    real_weight: Callable[[], Tensor]

    def real(self) -> Tensor:
        return self.real_weight()

    def exact(self) -> Tensor:
        return self.real().to(torch.float64)


Value = Codes | Sum | Sums | Addition | Concat | Weight
Clamp = tuple[float | None, float | None]


def _by_float(real: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantize real float32 numbers as QuantizeLinear does, without the clamp."""
    return torch.round(real / scale.to(torch.float32)).to(torch.int64) + zero_point


def _signed(ints: Tensor, multiplier: Tensor, rounding: str) -> Tensor:
    """Do `requantize` for a multiplier of any sign; the result is 0 where the multiplier is 0."""
    size = torch.where(multiplier == 0, 1.0, multiplier.abs())
    return requantize(ints * multiplier.sign().to(torch.int64), size, rounding)
