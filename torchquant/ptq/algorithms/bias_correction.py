"""Empirical bias correction."""

from __future__ import annotations

from torch import Tensor

from torchquant.ptq.functional.biases import bias_correction
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, BiasChange, Matching


@PTQ.register("bias_correction")
class BiasCorrection(Matching, BiasChange):
    """Make the mean of each output what it is in the float model (match="float"), or in the float layer ("layer")."""

    source = "Nagel et al. 2019, arXiv:1906.04721, section 4.2"
    when = "last, behind every change of weights"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"means", "float_means"} if self.match == "float" else {"means"})

    def bias(self, layer: Layer, data: LayerData) -> Tensor:
        rounded = layer.quantized() if layer.rounded is None else layer.rounded
        float_means = data.mean_float_input if self.match == "float" else None
        beside = 0.0 if layer.beside is None else layer.beside
        weight, rounded = ((w + beside).to(data.mean_input.dtype) for w in (layer.weight, rounded))
        return bias_correction(weight, rounded, data.mean_input, float_means).flatten()
