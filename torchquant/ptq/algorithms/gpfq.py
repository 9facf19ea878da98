"""GPFQ."""

from __future__ import annotations

from torch import Tensor

from torchquant.ptq.functional.mismatch import gpfq
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, Rounding


@PTQ.register("gpfq")
class GPFQ(Rounding):
    """Greedy path following: column after column, so that the output of the columns so far is the float one."""

    source = "Zhang, Zhou, Saab 2023, arXiv:2201.11113"
    when = "like gptq, without an inverse"
    cost = "rows K^2"
    needs = frozenset({"gram", "cross_gram"})

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        return gpfq(layer.weight, data.gram, data.cross_gram, layer.nearest)
