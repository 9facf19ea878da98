"""Learned clipping of OmniQuant."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from torchquant._arguments import Count, Positive
from torchquant.errors import ConfigError
from torchquant.ptq.block import Block, BlockData, optimize
from torchquant.ptq.functional.clipping import LEARNED_START
from torchquant.ptq.layer import Layer
from torchquant.ptq.stage import PTQ, BlockStage
from torchquant.ptq.stretched import StretchedWeight


class LearnedClip(StretchedWeight):
    """A weight whose range is clipped to a learned share, `sigmoid` of a parameter."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.logit = nn.Parameter(layer.weight.new_full(self.shape, LEARNED_START))

    def ratios(self) -> Tensor:
        return self.logit.sigmoid()

    def value(self) -> Tensor:
        return self.on_grid(self.layer.weight)


@PTQ.register("omniquant")
class OmniQuant(BlockStage):
    """Learn by gradients of the error of the block's output how far the range of each channel or group is clipped.

    Any scheme whose numbers are in the units of the weight. `steps` of Adam at `rate`, each on one batch.
    Deviation: one ratio clips both ends of a range. The paper's transformation of inputs is the stage `let`.
    """

    changes = "numbers"
    source = "Shao et al. 2023, arXiv:2308.13137, equation 2"
    when = "before a rounding; large outliers in the weights"
    cost = "200 forward and backward passes of the block"

    def __init__(self, steps: Count = 200, rate: Positive = 1e-2) -> None:
        self.steps, self.rate = steps, rate

    def optimize(self, block: Block, data: BlockData) -> Mapping[str, Tensor]:
        if rounded := [path for path, layer in block.layers.items() if layer.rounded is not None]:
            raise ConfigError(f"{', '.join(rounded)} is rounded already; put omniquant before the rounding")
        weights = {path: LearnedClip(layer) for path, layer in block.layers.items()}
        with block.replaced(weights):
            optimize(data, [([w.logit for w in weights.values()], self.rate)], self.steps)
        for path, weight in weights.items():
            block.layers[path].quantizer.set_numbers(**weight.numbers())
        return {}
