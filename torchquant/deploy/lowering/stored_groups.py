"""Weights with a uniform grid for each group of neighbours in a row, block or input channel, as a file stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchquant.deploy.lowering.export_grids import Grid, check_ready, grid_of
from torchquant.deploy.lowering.qdq import Terms, dequantize_linear, look_up_linear
from torchquant.deploy.lowering.stand_in import PassesForTensor
from torchquant.errors import NoAffineViewError
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.block_grid import Blocks
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.groups import Groups


@dataclass(frozen=True, eq=False)
class GroupCodes:
    """A weight in codes that count from the zero point of their group in steps of its scale.

    codes: (C, ...) int32, channels first. scale float32, zero_point int32: (C, groups). size: elements of a group, read
    along the flattened row; the last group of a row may be shorter. rows: how many rows, from the first on, have the
    same numbers.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    size: int
    rows: int = 1

    def picked(self, order: Tensor) -> GroupCodes:
        """The rows `order`."""
        return GroupCodes(self.codes[order], self.scale[order], self.zero_point[order], self.size)

    def along_longer_side(self) -> tuple[Tensor, Tensor, int, int]:
        """Return scale, zero point, axis and size of the same grids along the axis that needs fewer of them."""
        if self.size >= self.rows:
            return self.scale, self.zero_point, 1, self.size
        of_each = torch.arange(self.codes[0].numel(), device=self.codes.device) // self.size
        scale, zero_point = (numbers[:: self.rows, of_each] for numbers in (self.scale, self.zero_point))
        return scale, zero_point, 0, self.rows


def input_channel_codes(codes: Tensor, grid: Grid) -> GroupCodes:
    """The codes of a weight, channels first, whose grids lie along another axis than the output channel.

    With a `DequantizeLinear` along that axis ONNX Runtime would take an integer kernel, which fails or takes its scales
    for those of outputs.
    """
    assert grid.axis is not None
    inside = codes.shape[grid.axis + 1 :].numel()
    repeats = codes.shape[1 : grid.axis].numel()
    scale, zero_point = (n.repeat(repeats).expand(len(codes), -1) for n in (grid.scale, grid.zero_point))
    return GroupCodes(codes, scale, zero_point, inside, len(codes))


def group_codes(quantizer: Quantizer, weight: Tensor, name: str) -> GroupCodes | None:
    """The codes of a weight, channels first; None where the quantizer has no groups or their grids are not uniform.

    `name` says in messages where the quantizer sits. Raises ExportError for one that has seen no data.
    """
    check_ready(quantizer, name)
    form = quantizer.format()
    try:
        found = _numbers(form, weight, name)
    except NoAffineViewError:
        return None
    return None if found is None else replace(found, codes=quantizer.encode(weight))


def _numbers(form: Format, weight: Tensor, name: str) -> GroupCodes | None:
    """Return scale and zero point of each group of a row, with the weight in place of its codes."""

    def grid(own: Format) -> Grid:
        return grid_of(own.affine_params(), 0, name)

    if isinstance(form, Groups):
        parts = [grid(part) for part in (form.whole, form.last) if part is not None]
        scale, zero_point = (
            torch.cat([number.reshape(len(weight), -1) for number in numbers], 1)
            for numbers in ([part.scale for part in parts], [part.zero_point for part in parts])
        )
        return GroupCodes(weight, scale, zero_point, form.size)
    if not isinstance(form, Blocks):
        return None
    blocks, size, rows = grid(form.form), *form.blocks.runs(weight.shape)
    firsts = form.blocks.block_of_each(weight.shape, weight.device).flatten(1)[:, ::size]
    return GroupCodes(weight, blocks.scale[firsts], blocks.zero_point[firsts], size, rows)


class StoredGroups(PassesForTensor):
    """A weight kept as 8-bit codes with a scale for each group; forward gives the real weight, bit for bit.

    Its products are sums over groups of other scales, so that no layer computes them in whole numbers. `to_layer`
    brings the weight into the layout of its layer.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    terms: Terms = ()

    def __init__(self, kept: GroupCodes, to_layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        scale, zero_point, self.axis, self.size = kept.along_longer_side()
        lowest = min(int(kept.codes.min()), int(zero_point.min())) if kept.codes.numel() else 0
        storage = torch.uint8 if lowest >= 0 else torch.int8
        self.kept_shape, self.to_layer = kept.codes.shape, to_layer
        self.register_buffer("codes", kept.codes.flatten(1).to(storage))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(storage))

    def forward(self) -> Tensor:
        return self.real()

    def rows(self, index: Tensor) -> Tensor:
        if len(self.kept_shape) != 2:
            return super().rows(index)
        own = index // self.size if self.axis == 0 else index
        codes, scale, zero_point = (
            look_up_linear(numbers, of, None)
            for numbers, of in ((self.codes, index), (self.scale, own), (self.zero_point, own))
        )
        if self.axis == 1:
            scale, zero_point = (_spread(numbers, self.size, codes) for numbers in (scale, zero_point))
        return (codes.to(torch.float32) - zero_point.to(torch.float32)) * scale

    def real(self) -> Tensor:
        return self.to_layer(self.as_kept())

    def as_kept(self) -> Tensor:
        """The real weight in the order of the codes."""
        flat = dequantize_linear(self.codes, self.scale, self.zero_point, self.axis, self.size)
        return flat if len(self.kept_shape) == 2 else flat.reshape(self.kept_shape)


def _spread(numbers: Tensor, size: int, codes: Tensor) -> Tensor:
    """Repeat the numbers of groups for each of their elements. numbers: (*, groups); codes: (*, K)."""
    repeated = numbers.unsqueeze(-1).expand(*numbers.shape, size).flatten(-2)
    return repeated[..., : codes.shape[-1]]
