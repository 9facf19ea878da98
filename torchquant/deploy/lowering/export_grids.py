"""Compute the numbers that a runtime stores for a quantizer: codes, scales, 8-bit zero points, 32-bit biases.

Names follow ONNX here: `scale` is what the rest of torchquant calls delta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ExportError, NoAffineViewError, NoCodesError
from torchquant.qmodule.patterns import InputFirstPattern, LayerPattern
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._levels import level_values
from torchquant.quantizers_functional.bn_fold import channel_view
from torchquant.quantizers_functional.formats import AffineParams, UniformGrid
from torchquant.quantizers_functional.requantize import INT32_MAX

SMALLEST_SCALE = 2.0**-126
LARGEST_CODE = 255
LARGEST_TABLE_ENTRY = 127
LARGEST_IN_PAIRS = 2**15 // (2 * LARGEST_CODE)
LARGEST_INTEGER = 2**15
"""Weights that are larger multiples of their unit, such as 8-bit floats, enter sums as real numbers."""


@dataclass(frozen=True, eq=False)
class Grid(UniformGrid):
    """A uniform grid as a file holds it: scale float32 > 0 and zero_point int32, both () or (C,) along `axis`."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    @property
    def storage(self) -> torch.dtype:
        """The 8-bit type of codes and zero point."""
        return torch.uint8 if self.lowest >= 0 else torch.int8

    @property
    def lowest(self) -> int:
        """The lowest code, also among zero points."""
        return min(self.qmin, int(self.zero_point.min()))

    def unsigned(self) -> Grid:
        """Shift the codes so that they start at 0: `lowest` is subtracted, and the values stay the same."""
        lowest = self.lowest
        return replace(self, zero_point=self.zero_point - lowest, qmin=self.qmin - lowest, qmax=self.qmax - lowest)


def can_saturate(codes: Tensor) -> bool:
    """Tell whether two products of such a weight and codes up to 255 can exceed 16 bits.

    On x86 processors without VNNI, ONNX Runtime adds products of uint8 and int8 in pairs of 16 bits and saturates; it
    adds products of uint8 and uint8 exactly. codes: integers of a weight as stored.
    """
    return bool(codes.numel()) and int(codes.min()) < 0 and int(codes.abs().max()) > LARGEST_IN_PAIRS


def check_ready(quantizer: Quantizer, name: str) -> None:
    """Raise ExportError for a quantizer that has seen no data."""
    if not quantizer.is_ready:
        raise ExportError(
            f"{name} has seen no data. Run a batch in QModuleState.CALIBRATION (for weights alone "
            "torchquant.observe_weights(model) is enough), set its range with force_ranges(min, max), or "
            "give this site None to keep it float"
        )


def uniform_grid(quantizer: Quantizer, name: str) -> Grid:
    """Return the grid of a calibrated uniform quantizer. `name`: its site, for messages. Raises ExportError."""
    check_ready(quantizer, name)
    try:
        params = quantizer.affine_params()
    except NoAffineViewError as error:
        raise ExportError(
            f"{name} has no scale and zero point, which ONNX QuantizeLinear needs. Use a uniform scheme here, such as "
            "AffineQuantizer or QfmtQuantizer, or give this site None to keep it float"
        ) from error
    return grid_of(params, quantizer.axis, name)


def grid_of(params: AffineParams, axis: int | None, name: str) -> Grid:
    """The grid of these numbers, which lie along `axis` where they are several. Raises ExportError beyond 8 bits."""
    delta, zero_point, qmin, qmax = params
    scale = torch.as_tensor(delta).detach().clone()
    if scale.dtype != torch.float32:
        raise ExportError(
            f"{name} has a scale of type {scale.dtype}, but files are written in float32. Call model.float() and "
            "calibrate again"
        )
    offset = torch.as_tensor(zero_point, device=scale.device).to(torch.int32).expand_as(scale).clone()
    low, high = min(qmin, int(offset.min())), max(qmax, int(offset.max()))
    if not (low >= 0 and high <= 255) and not (low >= -128 and high <= 127):
        raise ExportError(
            f"{name} uses codes {qmin}..{qmax}, which 8 bits do not hold. Use n_bits <= 8, or give this site None to "
            "keep it float"
        )
    return Grid(scale, offset, qmin, qmax, axis=axis if scale.ndim else None)


def bias_codes(bias: Tensor, scale: Tensor, name: str) -> Tensor:
    """Compute `round_half_even(bias / scale)` (int64), 0 where the bias is 0. Raises ExportError beyond 32 bits."""
    codes = torch.where(bias == 0, 0.0, torch.round(bias.to(torch.float64) / scale))
    if not bool((codes.abs() <= INT32_MAX).all()):
        raise ExportError(
            f"{name}: a bias of {float(bias.abs().max()):.3g} exceeds 32 bits in steps of input scale times weight "
            f"scale, {float(scale.min()):.3g}. Calibrate with representative data, or give this site None"
        )
    return codes.to(torch.int64)


def fold_into_scale(codes: Tensor, grid: Grid, factor: Tensor) -> tuple[Tensor, Grid] | None:
    """Return codes and grid whose real values are those of `codes` times `factor`; None if this needs new codes.

    codes: (C, ...) int32, channels first. factor: (C,), any sign. A negative factor mirrors the codes
    of its channel. Signed codes are mirrored about 0, and the lowest of 2**n_bits codes may then need one code more
    (None beyond 8 bits); unsigned codes and their zero point about the middle of their range. A factor of 0
    keeps the scale and sets all codes to the zero point.
    """
    signed = grid.qmin < 0 and not bool(grid.zero_point.any())
    mirror = 0 if signed else grid.qmin + grid.qmax
    zero_point = torch.where(factor < 0, mirror - grid.zero_point, grid.zero_point)
    factors = channel_view(factor, codes.ndim, 0)
    codes = torch.where(factors < 0, mirror - codes, codes)
    codes = torch.where(factors == 0, channel_view(zero_point, codes.ndim, 0), codes)
    highest = max(grid.qmax, int(codes.max())) if codes.numel() else grid.qmax
    if highest > (LARGEST_TABLE_ENTRY if signed else grid.qmax):
        return None
    scale = torch.where(factor == 0, grid.scale, grid.scale * factor.abs()).clamp_min(SMALLEST_SCALE)
    return codes, replace(grid, scale=scale, zero_point=zero_point, axis=0, qmax=highest)


@dataclass(frozen=True)
class Table:
    """A weight whose levels do not form a uniform grid: a level for each code, and its integer terms if it has any.

    codes: (C, ...) int32 from 0 on, channels first. levels: (L,) or (C, L) float32, for the slices of `axis`. terms: as
    in `Quantizer.integer_terms`, with ints in place of tables: [(scale () or (C,) float64, (C, ...) int64)]; none for
    levels along another axis than 0.
    """

    codes: Tensor
    levels: Tensor
    terms: tuple[tuple[Tensor, Tensor], ...]
    axis: int = 0

    def real(self) -> Tensor:
        """Return the weight, float32."""
        return level_values(self.codes.to(torch.int64), self.levels, self.axis)

    def scaled(self, factor: Tensor) -> Table | None:
        """Return the table of the weight times `factor`, one for each output channel; None if this needs new codes."""
        if self.axis != 0:
            return None
        levels = self.levels * factor[:, None]
        signs = channel_view(factor.sign().to(torch.int64), self.codes.ndim, 0)
        sizes = torch.where(factor == 0, 1.0, factor.abs()).to(torch.float64)
        terms = tuple((scale * sizes, ints * signs) for scale, ints in self.terms)
        return replace(self, levels=levels.expand(len(factor), -1), terms=terms)

    def as_grid(self) -> tuple[Tensor, Grid] | None:
        """Return (ints, grid with zero point 0) if 8-bit integers times one scale equal the weight bit for bit."""
        if len(self.terms) != 1:
            return None
        scale, ints = self.terms[0]
        largest = int(ints.abs().max())
        single = scale.to(torch.float32)
        view = channel_view(single, ints.ndim, 0) if single.ndim else single
        if largest > LARGEST_TABLE_ENTRY or not torch.equal(ints.to(torch.float32) * view, self.real()):
            return None
        axis = 0 if single.ndim else None
        grid = Grid(single, torch.zeros_like(single, dtype=torch.int32), -largest, largest, axis=axis)
        return ints.to(torch.int32), grid


@torch.no_grad()
def weight_table(quantizer: Quantizer, weight: Tensor, name: str) -> Table:
    """Return the codes and levels of a weight under any quantizer with codes; channels first. Raises ExportError."""
    check_ready(quantizer, name)
    if quantizer.levels_vary:
        raise ExportError(
            f"{name} has scales per block or group, and their levels do not form a uniform grid. "
            "Use a uniform scheme, such as affine:4/group=32, or one scale per tensor or channel here, write a packed "
            "file (save_packed), or give this site None to keep it float"
        )
    try:
        codes, (low, high) = quantizer.encode(weight), quantizer.code_range
    except NoCodesError as error:
        raise ExportError(f"{name} cannot be exported: {error}") from error
    if high - low > LARGEST_CODE:
        raise ExportError(f"{name} uses codes {low}..{high}, which 8 bits do not hold. Use n_bits <= 8")
    levels, axis = quantizer.code_values(), (quantizer.axis or 0) % weight.ndim
    try:
        tables = quantizer.integer_terms() if axis == 0 else []
    except NoAffineViewError:
        tables = []
    if any(int(table.abs().max()) > LARGEST_INTEGER for _, table in tables):
        tables = []
    index = (codes - low).to(torch.int64)
    terms = tuple(_without_zero_scales(scale, level_values(index, table, axis)) for scale, table in tables)
    return Table(codes - low, levels, terms, axis)


def _without_zero_scales(scale: Tensor, ints: Tensor) -> tuple[Tensor, Tensor]:
    """Replace a scale of 0 by the smallest other scale, with integers 0, because biases are in steps of it."""
    dead = scale == 0
    others = scale[~dead].abs()
    stand_in = others.min() if others.numel() else torch.ones((), dtype=scale.dtype)
    ints = torch.where(channel_view(dead, ints.ndim, 0) if dead.ndim else dead, 0, ints)
    return torch.where(dead, stand_in, scale), ints


def layer_grid(grid: Grid, layer: Any, row: LayerPattern) -> Grid | None:
    """Convert the grid of a channels-first weight to the layout in which the layer stores the weight.

    The layouts differ for transposed convolutions, stored as (in, out / groups, ...): there the groups share the
    numbers of a per-output-channel grid. None if the groups have different numbers.
    """
    if isinstance(row, InputFirstPattern) and grid.axis == 0:
        return replace(grid, axis=1)
    if not row.transposed or grid.axis is None:
        return grid
    scales, offsets = grid.scale.view(layer.groups, -1), grid.zero_point.view(layer.groups, -1)
    if not (torch.equal(scales, scales[:1].expand_as(scales)) and torch.equal(offsets, offsets[:1].expand_as(offsets))):
        return None
    return replace(grid, scale=scales[0], zero_point=offsets[0], axis=1)
