"""The numbers a runtime stores for a uniform quantizer: codes, scales and zero points of 8 bits.

Names follow ONNX here: `scale` is what the rest of torchquant calls delta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ExportError, NoAffineViewError
from torchquant.qmodule.patterns import LayerRow
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.bn_fold import channel_view

SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Grid:
    """A uniform grid: real = (code - zero_point) * scale with qmin <= code <= qmax.

    scale float32 > 0 and zero_point int32: () for the whole tensor, or (C,) along `axis`.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None

    @property
    def storage(self) -> torch.dtype:
        """The 8-bit type of codes and zero point."""
        return torch.uint8 if min(self.qmin, int(self.zero_point.min())) >= 0 else torch.int8

    def real(self, code: int) -> Tensor:
        """The real value of `code`: () or (C,)."""
        return (code - self.zero_point) * self.scale


def uniform_grid(quantizer: Quantizer, name: str) -> Grid:
    """The grid of a calibrated uniform quantizer. `name` says in messages where it sits. Raises ExportError."""
    if not quantizer.is_ready:
        raise ExportError(
            f"{name} has seen no data. Run a batch in QModuleState.CALIBRATION (for weights alone "
            "torchquant.observe_weights(model) is enough), set its range by hand with force_ranges(min, max), or "
            "give this site None to keep it float"
        )
    try:
        delta, zero_point, qmin, qmax = quantizer.affine_params()
    except NoAffineViewError as error:
        raise ExportError(
            f"{name} has no step and zero point, which ONNX QuantizeLinear needs. Use a uniform scheme here, such as "
            "AffineQuantizer or QfmtQuantizer, or give this site None to keep it float"
        ) from error
    scale = torch.as_tensor(delta).detach().clone()
    if scale.dtype != torch.float32:
        raise ExportError(
            f"{name} has a step of type {scale.dtype}, but files are written in float32. Call model.float() and "
            "calibrate again"
        )
    offset = torch.as_tensor(zero_point, device=scale.device).to(torch.int32).expand_as(scale).clone()
    low, high = min(qmin, int(offset.min())), max(qmax, int(offset.max()))
    if not (low >= 0 and high <= 255) and not (low >= -128 and high <= 127):
        raise ExportError(
            f"{name} uses codes {qmin}..{qmax}, which 8 bits do not hold. Use n_bits <= 8, or give this site None to "
            "keep it float"
        )
    return Grid(scale, offset, qmin, qmax, quantizer.axis if scale.ndim else None)


def fold_into_scale(codes: Tensor, grid: Grid, factor: Tensor) -> tuple[Tensor, Grid] | None:
    """Codes and grid whose reals are those of `codes` times `factor`, or None if that takes new codes.

    codes: (C, ...) int32, channels first. factor: (C,), any sign. A negative factor mirrors the codes
    of its channel. Signed codes mirror about 0, which the lowest of 2**n_bits codes does not survive
    (None); unsigned ones about the middle of their range, the zero point with them. A factor of 0
    leaves the scale as it was and puts all codes at the zero point.
    """
    if grid.axis not in (None, 0):
        return None
    signed = grid.qmin < 0 and not bool(grid.zero_point.any())
    mirror = 0 if signed else grid.qmin + grid.qmax
    zero_point = torch.where(factor < 0, mirror - grid.zero_point, grid.zero_point)
    factors = channel_view(factor, codes.ndim, 0)
    codes = torch.where(factors < 0, mirror - codes, codes)
    codes = torch.where(factors == 0, channel_view(zero_point, codes.ndim, 0), codes)
    if bool((codes > grid.qmax).any()):
        return None
    scale = torch.where(factor == 0, grid.scale, grid.scale * factor.abs()).clamp_min(SMALLEST_SCALE)
    return codes, replace(grid, scale=scale, zero_point=zero_point, axis=0)


def layer_grid(grid: Grid, layer: Any, row: LayerRow) -> Grid | None:
    """The grid of a channels-first weight, for the weight as the layer stores it.

    They differ for transposed convolutions, stored as (in, out / groups, ...): there the groups share
    the numbers of a per-output-channel grid. None if the groups do not agree on them.
    """
    if not row.transposed or grid.axis not in (0, 1):
        return grid
    if grid.axis == 1:
        scales, offsets = grid.scale.repeat(layer.groups), grid.zero_point.repeat(layer.groups)
        return replace(grid, scale=scales, zero_point=offsets, axis=0)
    scales, offsets = grid.scale.view(layer.groups, -1), grid.zero_point.view(layer.groups, -1)
    if not (torch.equal(scales, scales[:1].expand_as(scales)) and torch.equal(offsets, offsets[:1].expand_as(offsets))):
        return None
    return replace(grid, scale=scales[0], zero_point=offsets[0], axis=1)
