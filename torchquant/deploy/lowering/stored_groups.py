"""Weights with a uniform grid for each group of neighbours in a row, as a file stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.deploy.lowering.export_grids import check_ready, grid_of
from torchquant.deploy.lowering.qdq import Terms, dequantize_linear
from torchquant.deploy.lowering.stand_in import PassesForTensor
from torchquant.errors import NoAffineViewError
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.groups import Groups


@dataclass(frozen=True, eq=False)
class GroupCodes:
    """A weight in codes that count from the zero point of their group in steps of its scale.

    codes: (C, ...) int32, channels first. scale float32, zero_point int32: (C, groups). size: elements of a group, read
    along the flattened row; the last group of a row may be shorter.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    size: int

    def picked(self, order: Tensor) -> GroupCodes:
        """The rows `order`."""
        return GroupCodes(self.codes[order], self.scale[order], self.zero_point[order], self.size)


def group_codes(quantizer: Quantizer, weight: Tensor, name: str) -> GroupCodes | None:
    """The codes of a weight, channels first; None where the quantizer has no groups or their grids are not uniform.

    `name` says in messages where the quantizer sits. Raises ExportError for one that has seen no data.
    """
    check_ready(quantizer, name)
    form = quantizer.format()
    if not isinstance(form, Groups):
        return None
    try:
        parts = [grid_of(part.affine_params(), 0, name) for part in (form.whole, form.last) if part is not None]
    except NoAffineViewError:
        return None
    rows = len(weight)
    scale, zero_point = (
        torch.cat([getattr(part, number).reshape(rows, -1) for part in parts], 1) for number in ("scale", "zero_point")
    )
    return GroupCodes(quantizer.encode(weight), scale, zero_point, form.size)


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
        lowest = min(int(kept.codes.min()), int(kept.zero_point.min())) if kept.codes.numel() else 0
        storage = torch.uint8 if lowest >= 0 else torch.int8
        self.size, self.kept_shape, self.to_layer = kept.size, kept.codes.shape, to_layer
        self.register_buffer("codes", kept.codes.flatten(1).to(storage))
        self.register_buffer("scale", kept.scale)
        self.register_buffer("zero_point", kept.zero_point.to(storage))

    def forward(self) -> Tensor:
        return self.real()

    def real(self) -> Tensor:
        return self.to_layer(self.as_kept())

    def as_kept(self) -> Tensor:
        """The real weight in the order of the codes."""
        flat = dequantize_linear(self.codes, self.scale, self.zero_point, 1, self.size)
        return flat if len(self.kept_shape) == 2 else flat.reshape(self.kept_shape)
