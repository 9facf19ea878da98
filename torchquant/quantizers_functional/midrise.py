"""Mid-rise grids: `(k + 1/2) * alpha + beta`, 2**n_bits levels, none of them at beta. docs/algorithms.md A3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection
from torchquant.quantizers_functional._row_statistics import row_sums_by_kernel, row_sums_of, shared_unit_rows
from torchquant.quantizers_functional.formats import KernelCall, Number, ScaledFormat
from torchquant.quantizers_functional.uniform import integer_codes

# n_bits -> step that minimises the squared error on N(0, 1); docs/algorithms.md H1.
MIDRISE_STEP = {
    1: 1.595769122,
    2: 0.9956866859,
    3: 0.5860194414,
    4: 0.3352006122,
    5: 0.1881387903,
    6: 0.1040630094,
    7: 0.05686767238,
    8: 0.03076238758,
    9: 0.01649895877,
    10: 0.008785464581,
    11: 0.004649841838,
    12: 0.002448411084,
}


def check_midrise(n_bits: int) -> None:
    """Raise ConfigError unless an optimal step is known for the width."""
    if n_bits not in MIDRISE_STEP:
        raise ConfigError(f"n_bits must be a whole number from 1 to {max(MIDRISE_STEP)}, got {n_bits!r}")


@dataclass(frozen=True, eq=False)
class MidriseGrid(ScaledFormat):
    """The midpoints `(k + 1/2) * scale + shift` of 2**n_bits equal cells around `shift`.

    `cell`: the width of the cells, if it differs from a fitted `scale`. Codes -2**(n-1) .. 2**(n-1) - 1.
    """

    n_bits: int
    cell: Number | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        return integer_codes(self.n_bits, True)

    @property
    def largest(self) -> float:
        return float(2 ** (self.n_bits - 1) - 0.5)

    @property
    def _cell(self) -> Number:
        return self.scale if self.cell is None else self.cell

    def _centred(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x - self.shaped(self.shift, x)

    def kernel(self) -> KernelCall | None:
        if self.shift is None:
            return "midrise", (self.scale, self._cell), self.code_range
        return "shifted_midrise", (self.scale, self._cell, self.shift), self.code_range

    def codes(self, x: Tensor) -> Tensor:
        cell = self.shaped(self._cell, x)
        safe = torch.where(cell > 0, cell, torch.ones_like(cell))
        return torch.div(self._centred(x), safe).floor_().clamp_(*self.code_range)

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype) + 0.5

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; x counts as clipped beyond the outermost cells."""
        value = self.values(self.codes(x), x.dtype)
        reach = self.shaped(self._cell, x) * 2 ** (self.n_bits - 1)
        return value, self._centred(x).abs().le_(reach) if want_inside else None

    def thresholds(self) -> Tensor:
        """Return the edges of the cells, without the outer two."""
        cell, (low, high) = torch.as_tensor(self._cell), self.code_range
        edges = torch.arange(low + 1, high + 1, device=cell.device) * cell[..., None]
        return edges if self.shift is None else edges + torch.as_tensor(self.shift)[..., None]


def point_sums(rows: Tensor, cell: Tensor, n_bits: int) -> Tensor:
    """Compute the sums of x times p and of p * p over each row, p the midpoint of its cell in cells around 0.

    rows: (C, n) float, n > 0. cell: (C,), width of the cells. (2, C) float64.
    """
    low, high = integer_codes(n_bits, True)
    sums = row_sums_by_kernel("cell_sums", rows, cell.to(torch.float32), low, high)
    if sums is not None:
        return sums
    units, unit = shared_unit_rows(rows)
    scaled = (cell / unit).to(units.dtype)[:, None]

    def products(units: Tensor) -> tuple[Tensor, Tensor]:
        points = MidriseGrid(scaled, n_bits).codes(units).add_(0.5)
        return units * points, points.square_()

    along, square = row_sums_of(products, units)
    return torch.stack([along * unit, square])


@explained
def midrise_quantize(
    x: Tensor,
    step: Tensor | float,
    n_bits: int,
    shift: Tensor | float = 0.0,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to the middle of its cell of width `step`; 2**n_bits cells around `shift`.

    x: (*) float. step, shift: () or broadcastable to x, same unit as x; step >= 0. Returns (*).
    `gradient="clipped"` stops the gradient outside the cells. Raises ConfigError.

    >>> midrise_quantize(torch.tensor([-9.0, -0.1, 0.4, 1.2]), 1.0, 2)
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """
    check_midrise(n_bits)
    return apply_projection(x, MidriseGrid(step, n_bits, shift=shift).project, gradient, clamp)
