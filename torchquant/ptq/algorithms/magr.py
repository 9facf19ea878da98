"""MagR."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import Count, NotNegative
from torchquant.ptq.functional.factors import largest_eigenvalue
from torchquant.ptq.functional.magnitude import reduce_magnitude
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, WeightChange


@PTQ.register("magr")
class MagR(WeightChange):
    """Lower the largest weight of each channel where the output hardly changes, so that its scale gets finer.

    `alpha`: strength, in units of the largest eigenvalue of the Gram matrix and of the mean weight.
    """

    source = "Zhang et al. 2024, arXiv:2406.00800"
    when = "before gptq at 3 bits and less, a scale for each channel"
    cost = "150 K^2 rows"
    needs = frozenset({"gram"})

    def __init__(self, alpha: NotNegative = 0.01, steps: Count = 150) -> None:
        self.alpha, self.steps = alpha, steps

    def change(self, layer: Layer, data: LayerData) -> Tensor:
        strength = self.alpha * largest_eigenvalue(data.gram).max() * layer.weight.abs().mean()
        return reduce_magnitude(layer.weight, data.gram, float(strength), self.steps)
