"""AutoRound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchquant._arguments import Count, NotNegative
from torchquant.errors import ConfigError
from torchquant.ptq.block import Block, BlockData, WeightInTraining
from torchquant.ptq.functional.gram import output_error
from torchquant.ptq.functional.learned_rounding import rounding_share
from torchquant.ptq.functional.sign_rounding import offset_rounding, sign_rates, sign_rounding, sign_step
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, BlockStage, MatchingRounding


class OffsetRounding(WeightInTraining):
    """A weight that goes up where its share of the way up and a learned offset are one half or more."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.below, self.above = layer.neighbours(layer.weight)
        self.share = rounding_share(layer.weight, self.below, self.above)
        self.offset = torch.zeros_like(self.share)

    def value(self) -> Tensor:
        return offset_rounding(self.share, self.offset, self.below, self.above)


@PTQ.register("autoround")
class AutoRound(MatchingRounding, BlockStage):
    """Learn the rounding by the sign of its gradients, and keep the best of all steps.

    Between the two neighbours on any grid; never worse than rounding to nearest. `unit`: "layer" takes the error of a
    layer's output from the Gram matrix of all inputs, damped by `damp`, as for `gptq`; "block" that of a block's
    output, each step on one batch, as published; the best of ten looks at all batches is kept. `match`: of layers.
    Deviation: ranges are not learned.
    """

    source = "Cheng et al. 2023, arXiv:2309.05516"
    when = "like adaround, in fewer steps"
    cost = "200 rows K^2"

    def __init__(
        self, match: str = "float", steps: Count = 200, unit: str = "layer", damp: NotNegative | None = None
    ) -> None:
        super().__init__(match)
        if unit not in ("layer", "block"):
            raise ConfigError(f"unit must be 'layer' or 'block', got {unit!r}")
        if unit == "block" and match != "float":
            raise ConfigError("a block matches the output of the float block; match='layer' is for unit='layer'")
        self.steps, self.unit, self.damp = steps, unit, damp

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        target = self.target(layer, data).to(torch.float32)
        below, above = (level.to(torch.float32) for level in layer.neighbours(target.to(layer.weight.dtype)))
        gram = data.damped(self.damp).to(torch.float32)

        def loss(rounded: Tensor) -> Tensor:
            return output_error(rounded - target, gram).sum()

        with torch.enable_grad():
            return sign_rounding(target, below, above, loss, self.steps, layer.quantizer.n_bits)[0]

    def optimize(self, block: Block, data: BlockData) -> Mapping[str, Tensor]:
        weights = {path: OffsetRounding(layer) for path, layer in block.layers.items()}
        n_bits = max((layer.quantizer.n_bits for layer in block.layers.values()), default=None)
        best, least = {path: w.value() for path, w in weights.items()}, float("inf")
        with block.replaced(weights):
            for step, rate in enumerate(sign_rates(self.steps, n_bits)):
                if step % max(1, self.steps // 10) == 0:
                    best, least = self._better(data, weights, best, least)
                self._step(data, list(weights.values()), rate)
            return self._better(data, weights, best, least)[0]

    def _better(
        self, data: BlockData, weights: Mapping[str, OffsetRounding], best: dict[str, Tensor], least: float
    ) -> tuple[dict[str, Tensor], float]:
        """Return the rounding of less error on all batches, the current one or the best so far, and its error."""
        found = data.error()
        return ({path: w.value() for path, w in weights.items()}, found) if found < least else (best, least)

    def _step(self, data: BlockData, weights: list[OffsetRounding], rate: float) -> None:
        offsets = [w.offset.requires_grad_() for w in weights]
        for w, gradient in zip(weights, data.gradients(offsets), strict=True):
            w.offset = w.offset.detach() if gradient is None else sign_step(w.offset.detach(), gradient, rate)
