"""BRECQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from torchquant._arguments import Bounds, Count, NotNegative, Positive
from torchquant.errors import ConfigError
from torchquant.ptq.block import ActivationInTraining, Block, BlockData, optimize
from torchquant.ptq.functional.learned_rounding import rounding_beta
from torchquant.ptq.learned_rounding import LearnedRounding
from torchquant.ptq.stage import PTQ, BlockStage
from torchquant.ptq.stretched import stretch_activations


@PTQ.register("brecq")
class BRECQ(BlockStage):
    """Learn for all weights of a block whether they go up or down, by gradients of the error of the block's output.

    On any grid that has neighbours; behind another rounding it starts from that. `steps` of Adam at `rate`, each on one
    batch, the regulariser weighted by `weight`. `drop`: the share of elements that are not quantized while learning, at
    random, of the block's input and of the activations in it (QDrop). `fisher`: "none" weighs all outputs alike, "diag"
    by the squared gradients of the divergence of the model's prediction from the float one; it runs the model once more
    for each block and batch. `activation_steps`: of Adam at `activation_rate`, which then stretch the ranges of the
    activations in the block.
    Deviation: errors are relative to the square of the float output, so that one `weight` serves all blocks.
    """

    changes = "roundings"
    source = "Li et al. 2021, arXiv:2102.05426"
    when = "4 bits and less, with residual blocks or attention; slower than gptq"
    cost = "300 forward and backward passes of the block"

    def __init__(
        self,
        steps: Count = 300,
        rate: Positive = 0.1,
        weight: NotNegative = 0.1,
        drop: Annotated[float, Bounds(0, below=1)] = 0.0,
        fisher: str = "none",
        activation_steps: Annotated[int, Bounds(0)] = 0,
        activation_rate: Positive = 1e-3,
    ) -> None:
        if fisher not in ("none", "diag"):
            raise ConfigError(f"fisher must be 'none' or 'diag', got {fisher!r}")
        self.steps, self.rate, self.weight, self.drop, self.fisher = steps, rate, weight, drop, fisher
        self.activation_steps, self.activation_rate = activation_steps, activation_rate

    @property
    def by_gradients(self) -> bool:
        return self.fisher == "diag"

    def optimize(self, block: Block, data: BlockData) -> Mapping[str, Tensor]:
        weights = {path: LearnedRounding(layer) for path, layer in block.layers.items()}
        n_free = max(1, sum(int((w.above > w.below).sum()) for w in weights.values()))

        def penalty(step: int) -> Tensor | None:
            beta = rounding_beta(step, self.steps)
            if beta is None:
                return None
            return torch.stack([w.regulariser(beta) for w in weights.values()]).sum() * (self.weight / n_free)

        with block.replaced(weights, self._dropping(block, data)):
            optimize(data, [([w.logits for w in weights.values()], self.rate)], self.steps, self.drop, penalty)
        rounded = {path: w.rounded() for path, w in weights.items()}
        if self.activation_steps:
            stretch_activations(block, data, rounded, self.activation_steps, self.activation_rate, self.drop)
        return rounded

    def _dropping(self, block: Block, data: BlockData) -> dict[str, ActivationInTraining]:
        if not self.drop:
            return {}
        return {key: ActivationInTraining(q, self.drop, data.generator) for key, q in block.activations().items()}
