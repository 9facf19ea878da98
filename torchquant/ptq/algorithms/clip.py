"""Clipped ranges by output error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from torch import Tensor

from torchquant._arguments import Bounds
from torchquant.ptq.functional.clipping import best_ratios
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, NumberSearch
from torchquant.ptq.stretched import stretched


@PTQ.register("clip")
class Clip(NumberSearch):
    """Shrink the range of each channel or group to where the output error of rounding to nearest is least.

    Any scheme whose numbers are in the units of the weight, one for each channel, for each group, or for all. Products
    of columns of two groups are left out. `steps` ratios from 1 down to `least`.
    """

    source = "Lin et al. 2024, arXiv:2306.00978, section 3.2"
    when = "before gptq; large outliers in the weights"
    cost = "20 roundings"
    needs = frozenset({"gram"})

    def __init__(
        self, least: Annotated[float, Bounds(above=0, below=1)] = 0.5, steps: Annotated[int, Bounds(2)] = 20
    ) -> None:
        self.ratios = [1.0 - (1.0 - least) * step / (steps - 1) for step in range(steps)]

    def importance(self, data: LayerData) -> Tensor:
        """Return what weighs the errors of the weights: (groups, K, K), or (groups, K) for columns by themselves."""
        return data.gram

    def numbers(self, layer: Layer, data: LayerData) -> Mapping[str, Tensor]:
        size, full = layer.group_size, layer.numbers_by_row()

        def quantize(weight: Tensor, ratio: float) -> Tensor:
            layer.quantizer.set_numbers(**{name: number * ratio for name, number in full.items()})
            return layer.quantized(weight)

        try:
            best = best_ratios(layer.weight, self.importance(data), quantize, self.ratios, size).flatten(0, 1)
        finally:
            layer.quantizer.set_numbers(**full)
        return stretched(full, best, layer.weight.shape[-1], size)
