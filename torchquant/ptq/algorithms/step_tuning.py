"""Scales by gradients of the block's error, codes fixed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchquant._arguments import Count, Positive
from torchquant.ptq.block import Block, BlockData, optimize
from torchquant.ptq.stage import PTQ, BlockStage
from torchquant.ptq.stretched import LearnedRatio


@PTQ.register("step_tuning")
class StepTuning(BlockStage):
    """Learn by gradients of the error of the block's output how far the levels of each channel or group are stretched.

    The codes stay: those of the rounding before it, else those of rounding to nearest. For schemes whose numbers are in
    the units of the weight. `steps` of Adam at `rate`, each on one batch.
    """

    changes = "numbers"
    source = "Hubara et al. 2020, arXiv:2006.10518, section 3.1"
    when = "behind a rounding; like refit, for blocks"
    cost = "200 forward and backward passes of the block"

    def __init__(self, steps: Count = 200, rate: Positive = 1e-3) -> None:
        self.steps, self.rate = steps, rate

    def optimize(self, block: Block, data: BlockData) -> Mapping[str, Tensor]:
        levels = {p: layer.quantized() if layer.rounded is None else layer.rounded for p, layer in block.layers.items()}
        weights = {path: LearnedRatio(layer, levels[path]) for path, layer in block.layers.items()}
        with block.replaced(weights):
            optimize(data, [([w.ratio for w in weights.values()], self.rate)], self.steps)
        return {p: layer.at_its_codes(levels[p], weights[p].numbers()) for p, layer in block.layers.items()}
