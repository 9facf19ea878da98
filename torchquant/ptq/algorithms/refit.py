"""Scales by least squares, codes fixed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, Matching, NumberSearch
from torchquant.ptq.stretched import stretched


@PTQ.register("refit")
class Refit(Matching, NumberSearch):
    """Stretch the levels of each channel to where the output error of its codes is least.

    `r = (q H w) / (q H q)` for the rounded weight q. For schemes whose numbers are in the units of the weight; where
    they take powers of two only, what comes out may be no better, and is undone. `match` as in roundings.
    """

    source = "Hubara et al. 2020, arXiv:2006.10518, section 3.1"
    when = "behind a rounding"
    cost = "rows K^2"

    def numbers(self, layer: Layer, data: LayerData) -> Mapping[str, Tensor]:
        full = layer.numbers_by_row(in_groups=False)
        target = self.target(layer, data)
        q = (layer.quantized() if layer.rounded is None else layer.rounded).to(data.gram.dtype)
        along = ((q @ data.gram) * target.to(q.dtype)).sum(-1).flatten()
        power = ((q @ data.gram) * q).sum(-1).flatten()
        if all(number.numel() == 1 for number in full.values()):
            along, power = along.sum().expand(along.shape), power.sum().expand(power.shape)
        ratios = torch.where((power > 0) & (along > 0), along / power.where(power > 0, 1.0), 1.0)
        return stretched(full, ratios[:, None], layer.weight.shape[-1], None)
