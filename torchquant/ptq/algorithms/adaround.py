"""AdaRound."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import Count, NotNegative, Positive
from torchquant.ptq.functional.gram import output_error
from torchquant.ptq.functional.learned_rounding import (
    hard_weight,
    rectified_sigmoid,
    rounding_beta,
    rounding_logits,
    rounding_regulariser,
    soft_weight,
)
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, MatchingRounding


@PTQ.register("adaround")
class AdaRound(MatchingRounding):
    """Learn for each weight whether it goes up or down, by gradients of the layer's output error.

    Between the two neighbours on any grid. `steps` of Adam at `rate`, the regulariser weighted by `weight`. Deviation:
    the error comes from the Gram matrix of all inputs, not from mini-batches, so that no inputs are kept and nothing is
    drawn at random; it is damped by `damp`, as for `gptq`; the activation behind the layer is not looked at. The error
    is relative to the mean square of a channel's output, so that one `weight` serves all layers.
    """

    source = "Nagel et al. 2020, arXiv:2004.10568"
    when = "convolutional networks at 4 bits; slower than gptq"
    cost = "300 rows K^2"

    def __init__(
        self,
        match: str = "float",
        steps: Count = 300,
        rate: Positive = 0.1,
        weight: NotNegative = 0.1,
        damp: NotNegative | None = None,
    ) -> None:
        super().__init__(match)
        self.steps, self.rate, self.weight, self.damp = steps, rate, weight, damp

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        target = self.target(layer, data).to(torch.float32)
        below, above = (level.to(torch.float32) for level in layer.neighbours(target.to(layer.weight.dtype)))
        gram = data.damped(self.damp).to(torch.float32)
        signal = output_error(layer.weight, gram).mean().clamp_min(1e-30)
        free = above > below
        with torch.enable_grad():
            logits = rounding_logits(target, below, above).requires_grad_(True)
            optimizer = torch.optim.Adam([logits], self.rate)
            for step in range(self.steps):
                share = rectified_sigmoid(logits)
                difference = soft_weight(share, below, above) - target
                loss = output_error(difference, gram).sum() / signal
                beta = rounding_beta(step, self.steps)
                if beta is not None:
                    loss = loss + self.weight * rounding_regulariser(share[free], beta) / target.shape[-1]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return hard_weight(rectified_sigmoid(logits.detach()), below, above)
