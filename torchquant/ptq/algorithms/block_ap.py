"""Block-wise training of all parameters, of EfficientQAT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchquant._arguments import Count, NotNegative, Positive
from torchquant.ptq.block import Block, BlockData, optimize
from torchquant.ptq.layer import Layer
from torchquant.ptq.stage import PTQ, BlockStage
from torchquant.ptq.stretched import LearnedRatio


class TrainedWeight(LearnedRatio):
    """A weight that is trained with its grid. `offset`: what is added to it, in units of the mean gap of its levels."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        below, above = layer.neighbours(layer.weight)
        gap = above - below
        self.unit = gap.sum() / gap.gt(0).sum().clamp_min(1)
        self.offset = nn.Parameter(torch.zeros_like(layer.weight))

    def trained(self) -> Tensor:
        """Return the weight that is quantized."""
        weight: Tensor = self.layer.weight + self.unit * self.offset
        return weight

    def value(self) -> Tensor:
        return self.on_grid(self.trained())


@PTQ.register("block_ap")
class BlockAP(BlockStage):
    """Train all weights of a block and the numbers of their grids, straight through, for the error of its output.

    For schemes whose numbers are in the units of the weight. `steps` of Adam, each on one batch: weights at `rate`, in
    units of the mean gap between levels, scales at `scale_rate`, in units of themselves.
    """

    changes = "roundings"
    source = "Chen et al. 2024, arXiv:2407.11062, section 3.2"
    when = "3 bits and less, with many batches: it can move a weight by more than a level"
    cost = "300 forward and backward passes of the block"

    def __init__(self, steps: Count = 300, rate: Positive = 1e-2, scale_rate: NotNegative = 1e-3) -> None:
        self.steps, self.rate, self.scale_rate = steps, rate, scale_rate

    def optimize(self, block: Block, data: BlockData) -> Mapping[str, Tensor]:
        weights = {path: TrainedWeight(layer) for path, layer in block.layers.items()}
        groups = [
            ([w.offset for w in weights.values()], self.rate),
            ([w.ratio for w in weights.values()], self.scale_rate),
        ]
        with block.replaced(weights):
            optimize(data, groups, self.steps)
        rounded = {}
        for path, layer in block.layers.items():
            layer.quantizer.set_numbers(**weights[path].numbers())
            rounded[path] = layer.quantized(weights[path].trained().detach())
        return rounded
