"""AutoRound."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.ptq.functional.sign_rounding import sign_rounding
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, MatchingRounding


@PTQ.register("autoround")
class AutoRound(MatchingRounding):
    """Learn the rounding by the sign of its gradients, and keep the best of all steps.

    Between the two neighbours on any grid; never worse than rounding to nearest. Deviation: layer by layer, with the
    error from the Gram matrix of all inputs, not block by block with mini-batches; ranges are not learned.
    """

    source = "Cheng et al. 2023, arXiv:2309.05516"
    when = "like adaround, in fewer steps"
    cost = "200 rows K^2"

    def __init__(self, match: str = "float", steps: int = 200) -> None:
        super().__init__(match)
        self.steps = steps

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        target = self.target(layer, data).to(torch.float32)
        below, above = (level.to(torch.float32) for level in layer.neighbours(target.to(layer.weight.dtype)))
        gram = data.gram.to(torch.float32)

        def loss(rounded: Tensor) -> Tensor:
            difference = rounded - target
            return ((difference @ gram) * difference).sum()

        with torch.enable_grad():
            return sign_rounding(target, below, above, loss, self.steps, layer.quantizer.n_bits)[0]
