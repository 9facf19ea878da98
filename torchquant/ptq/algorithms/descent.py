"""Cyclic coordinate descent over levels."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import Count, NotNegative
from torchquant.ptq.functional.refits import coordinate_descent
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, MatchingRounding


@PTQ.register("descent")
class Descent(MatchingRounding):
    """Move one weight at a time to the level of least output error; each move lowers it.

    Begins at what an algorithm before it has chosen, else at rounding to nearest. `sweeps`: over all columns, at most.
    `damp` of the Gram matrix: as for `gptq`.
    """

    when = "behind gptq or another rounding; any level can be reached"
    cost = "3 rows K^2"

    def __init__(self, match: str = "float", sweeps: Count = 3, damp: NotNegative | None = None) -> None:
        super().__init__(match)
        self.sweeps, self.damp = sweeps, damp

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        start = layer.quantized() if layer.rounded is None else layer.rounded
        return coordinate_descent(self.target(layer, data), start, data.damped(self.damp), layer.nearest, self.sweeps)
