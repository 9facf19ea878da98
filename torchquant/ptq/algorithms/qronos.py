"""Qronos."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import Count, NotNegative
from torchquant.ptq.functional.mismatch import qronos
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, Rounding


@PTQ.register("qronos")
class Qronos(Rounding):
    """The first column rounded for mismatched inputs, the others solved for, then on as GPTQ.

    `damp`: in units of the largest eigenvalue of the Gram matrix; large language models take 1e-3.
    """

    source = "Zhang et al. 2025, arXiv:2505.11695"
    when = "like gptq, where earlier layers have left much to make good"
    cost = "K^3 + rows K^2"
    needs = frozenset({"gram", "cross_gram"})

    def __init__(self, damp: NotNegative = 1e-3, block: Count = 128) -> None:
        self.damp, self.block = damp, block

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        data.check(self.damp)
        return qronos(layer.weight, data.gram, data.cross_gram, layer.nearest, self.damp, self.block)
