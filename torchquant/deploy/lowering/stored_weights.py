"""Convert a quantized weight to its stored form: codes on a grid, or codes of levels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.lowering.export_grids import (
    Grid,
    Table,
    can_saturate,
    fold_into_scale,
    layer_grid,
    uniform_grid,
    weight_table,
)
from torchquant.deploy.lowering.qdq import StoredTable, StoredWeight, Terms
from torchquant.deploy.lowering.stored_groups import GroupCodes, StoredGroups, group_codes, input_channel_codes
from torchquant.errors import ExportError, NoAffineViewError
from torchquant.qmodule import QWrapper
from torchquant.qmodule.bn_folding import running_factor
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.bn_fold import channel_view


def stored_weight(
    wrapper: QWrapper, quantizer: Quantizer, layer: nn.Module, path: str, keep_signed: bool
) -> tuple[Stored, nn.Module | None]:
    """The weight as the layer takes it, and the batch norm that is left to run."""
    name = f"{path}: the weight quantizer ({type(quantizer).__name__})"
    weight = wrapper.float_weight()
    bn = None if wrapper.fold_mode else wrapper.bn
    factor = running_factor(bn) if bn is not None and _can_fold(bn, layer) else None
    kept = encoded_weight(weight, quantizer, name, path)
    if factor is not None and not isinstance(kept, GroupCodes):
        folded = kept.scaled(factor) if isinstance(kept, Table) else fold_into_scale(*kept, factor)
        if folded is not None:
            kept, bn = folded, None
    to_layer = partial(wrapper.row.channels_first, layer)
    layout = Layout(to_layer, partial(layer_grid, layer=wrapper.layer, row=wrapper.row))
    return stored(kept, layout, keep_signed), bn


Stored = StoredWeight | StoredTable | StoredGroups


@dataclass(frozen=True)
class Layout:
    """The layout in which a module stores a weight, relative to output channels on axis 0.

    `to_layer(weight)`: converts to the module's layout. `grid(grid)`: the grid for that layout, None if there is none.
    """

    to_layer: Callable[[Tensor], Tensor]
    grid: Callable[[Grid], Grid | None]


def _as_it_is(value: Any) -> Any:
    return value


def _none(grid: Grid) -> None:
    return None


AS_IT_IS = Layout(_as_it_is, _as_it_is)


def rearranged(to_layer: Callable[[Tensor], Tensor]) -> Layout:
    """Return a layout in which no grid has its numbers along one axis: codes are rearranged behind their decoding."""
    return Layout(to_layer, _none)


def from_order(order: Tensor) -> Layout:
    """Return the layout of a module whose weight is stored with its rows in the order `order`."""
    return rearranged(partial(_rows, order.argsort()))


def _rows(order: Tensor, weight: Tensor) -> Tensor:
    return weight[order]


Encoded = Table | GroupCodes | tuple[Tensor, Grid]


def encoded_weight(weight: Tensor, quantizer: Quantizer, name: str, path: str) -> Encoded:
    """The weight in codes of a uniform grid, of one for each group or input channel, or of any other scheme.

    Its output channel is on axis 0.

    Raises ExportError.
    """
    if weight.dtype != torch.float32:
        raise ExportError(f"{path}: the weight is {weight.dtype}, but files are written in float32. Call model.float()")
    grouped = group_codes(quantizer, weight, name)
    if grouped is not None:
        return grouped
    try:
        grid = uniform_grid(quantizer, name)
    except ExportError as error:
        if not isinstance(error.__cause__, NoAffineViewError):
            raise
        return weight_table(quantizer, weight, name)
    codes, axis = quantizer.encode(weight), None if grid.axis is None else grid.axis % weight.ndim
    grid = replace(grid, axis=axis)
    return (codes, grid) if axis in (None, 0) else input_channel_codes(codes, grid)


def picked_rows(kept: Encoded, order: Tensor) -> Encoded:
    """The rows `order` of an encoded weight."""
    if isinstance(kept, GroupCodes):
        return kept.picked(order)
    if isinstance(kept, Table):
        levels = kept.levels[order] if kept.levels.ndim == 2 and kept.axis == 0 else kept.levels
        terms = tuple((scale[order] if scale.ndim else scale, ints[order]) for scale, ints in kept.terms)
        return Table(kept.codes[order], levels, terms, kept.axis)
    codes, grid = kept
    if grid.axis == 0:
        grid = replace(grid, scale=grid.scale[order], zero_point=grid.zero_point[order])
    return codes[order], grid


def _on_grid(codes: Tensor, grid: Grid, layout: Layout, keep_signed: bool, table: Tensor | None = None) -> StoredWeight:
    """Store codes in the layer's layout if their grid allows it; else channels first, converted after decoding."""
    ints = codes if table is None else table[codes.to(torch.int64)]
    if not keep_signed and can_saturate(ints):
        offset, grid = grid.lowest, grid.unsigned()
        ints = ints - offset
        codes, table = (ints, None) if table is None else (codes, table - offset)
    scale = grid.scale.to(torch.float64)
    zero_point = grid.zero_point if grid.axis is None else channel_view(grid.zero_point, ints.ndim, 0)
    terms: Terms = ((scale, layout.to_layer(ints.to(torch.int32) - zero_point)),)
    laid_out = layout.grid(grid)
    if laid_out is None:
        return StoredWeight(codes, grid, terms, layout.to_layer, table)
    return StoredWeight(layout.to_layer(codes), laid_out, terms, None, table)


def stored(kept: Encoded, layout: Layout, keep_signed: bool) -> Stored:
    """In the narrowest of: whole numbers times a scale; codes that count in such; codes that count in levels.

    Codes of groups stay as they are.
    """
    if isinstance(kept, GroupCodes):
        return StoredGroups(kept, layout.to_layer)
    if not isinstance(kept, Table):
        return _on_grid(*kept, layout, keep_signed)
    as_grid = kept.as_grid()
    if as_grid is None:
        terms = tuple((scale, layout.to_layer(ints)) for scale, ints in kept.terms)
        return StoredTable(kept, terms, layout.to_layer)
    ints, grid = as_grid
    if stored_bits(grid.qmin, grid.qmax) <= stored_bits(0, kept.levels.shape[-1] - 1):
        return _on_grid(ints, grid, layout, keep_signed)
    values, codes = torch.unique(ints, return_inverse=True)
    return _on_grid(codes, grid, layout, keep_signed, values)


def stored_bits(low: int, high: int) -> int:
    """Return the bits of the narrowest ONNX type that holds low..high: 2, 4 or 8, signed if low is below 0.

    >>> [stored_bits(*ends) for ends in ((-1, 1), (0, 3), (-7, 7), (-8, 8))]
    [2, 2, 4, 8]
    """
    return next(n for n in (2, 4, 8) if low >= (-(2 ** (n - 1)) if low < 0 else 0) and high < 2 ** (n - (low < 0)))


def _can_fold(bn: nn.Module, layer: nn.Module) -> bool:
    """Tell whether the batch norm acts on the output channels: unknown for Linear, whose input may be (N, C, L)."""
    return bn.running_mean is not None and not isinstance(layer, nn.Linear)


def without_weight(layer: Any) -> nn.Module:
    """Copy a layer without the values of its float weight; shape, type and device of the weight are kept."""
    empty = nn.Parameter(layer.weight.new_zeros(()).expand_as(layer.weight), requires_grad=False)
    return copy.deepcopy(layer, {id(layer.weight): empty})
