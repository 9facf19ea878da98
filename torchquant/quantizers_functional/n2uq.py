"""Learned uneven thresholds with even levels, for activations. docs/algorithms.md B21."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._levels import level_values
from torchquant.quantizers_functional.formats import Format, IntegerTerms

MOST_BITS = 4  # a pass over the tensor for each threshold


def check_n2uq(n_bits: int) -> None:
    """Raise ConfigError unless n_bits is 1..4."""
    if not (isinstance(n_bits, int) and 1 <= n_bits <= MOST_BITS):
        raise ConfigError(f"n_bits must be a whole number from 1 to {MOST_BITS}, got {n_bits!r}")


@dataclass(frozen=True, eq=False)
class UnevenCells(Format):
    """The levels `step * code`; code i begins in the middle of the i-th of the cells that lie side by side from 0 on.

    widths: (L,) or (C, L), > 0, of the cells; step: () or (C,). Codes 0..L.
    """

    widths: Tensor
    level_step: Tensor

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, self.widths.shape[-1]

    def decoding_numbers(self) -> list[Tensor]:
        return [self.level_step]

    def thresholds(self) -> Tensor:
        return self._edges()[..., :-1] + self.widths / 2.0

    def _edges(self) -> Tensor:
        """Return where the cells begin, and where the last one ends."""
        return F.pad(self.widths.cumsum(-1), (1, 0))

    def codes(self, x: Tensor) -> Tensor:
        codes = x.clamp(0.0, 0.0)  # 0, or NaN
        for threshold in self.thresholds().unbind(-1):
            codes += x.gt(self.shaped(threshold, x)).to(x.dtype)
        return codes

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes.to(dtype)
        return codes * self.shaped(self.level_step, codes)

    def preimage(self, values: Tensor) -> Tensor:
        codes = (values / self.shaped(self.level_step, values)).round().clamp(*self.code_range)
        return level_values(codes.to(torch.int64), self._edges(), self.axis).to(values.dtype)

    def integer_terms(self) -> IntegerTerms:
        return [(self.level_step.detach().to(torch.float64).cpu(), torch.arange(self.code_range[1] + 1))]


class _Uneven(torch.autograd.Function):
    """Projects on `UnevenCells`; backward takes the polygon that rises by a step over each cell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Tensor, step: Tensor, axis: int | None, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, widths, step)
        ctx.axis, ctx.gradient_scale = axis, gradient_scale
        return UnevenCells(widths, step, axis=axis).project(x)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        x, widths, step = ctx.saved_tensors
        cells = UnevenCells(widths, step, axis=ctx.axis)
        others = [dim for dim in range(x.ndim) if ctx.axis is None or dim != ctx.axis % x.ndim]

        def total(of: Tensor) -> Tensor:
            return of.sum(others) if others else of

        low = torch.zeros_like(cells.shaped(step, x))
        slope, along, within = torch.zeros_like(x), [], []
        for width in widths.unbind(-1):
            size = cells.shaped(width, x)
            inside = x.gt(low).to(x.dtype).mul_(x.le(low + size).to(x.dtype)).div_(size)
            slope += inside
            along.append(total(grad * inside))
            within.append(total(grad * inside * ((x - low) / size)))
            low = low + size
        rises, bends = torch.stack(along, -1), torch.stack(within, -1)
        behind = rises.flip(-1).cumsum(-1).flip(-1) - rises  # the cells above each
        for_widths = (behind + bends) * -step[..., None] * ctx.gradient_scale
        for_step = total(grad * cells.codes(x)) * ctx.gradient_scale
        return grad * slope * cells.shaped(step, x), for_widths, for_step, None, None


@explained
def n2uq_quantize(
    x: Tensor, widths: Tensor, step: Tensor, axis: int | None = None, gradient_scale: float = 1.0
) -> Tensor:
    """Quantize x to `step * (number of thresholds below x)`; the i-th threshold is in the middle of the i-th cell.

    x: (*) float. widths: (L,) or (C, L) along `axis`, > 0, unit of x: the cells, which lie side by side from 0 on.
    step: () or (C,). Returns (*). Gradients: of the polygon that rises by a step over each cell, so that x has
    `step / width` in a cell and 0 outside; those of widths and step are summed and multiplied by `gradient_scale`.
    Source: Liu et al. 2022, N2UQ, arXiv:2111.14826, eq. 5-9.

    >>> widths = torch.tensor([0.6, 0.8, 1.6])
    >>> n2uq_quantize(torch.tensor([-0.2, 0.5, 1.3, 3.5]), widths, torch.tensor(1.0))
    tensor([0., 1., 2., 3.])
    """
    real = x.to(compute_dtype(x))
    value = _Uneven.apply(real, widths.to(real.dtype), step.to(real.dtype), axis, gradient_scale)
    return cast_back(cast(Tensor, value), x.dtype)
