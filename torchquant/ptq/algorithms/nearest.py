"""Rounding to nearest: what all others are measured against."""

from __future__ import annotations

from torch import Tensor

from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, Rounding


@PTQ.register("nearest")
class Nearest(Rounding):
    """Each weight goes to its nearest level."""

    when = "to compare with"

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        return layer.quantized()
