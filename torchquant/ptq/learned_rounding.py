"""A weight in training between two levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant.ptq.block import WeightInTraining
from torchquant.ptq.functional.learned_rounding import (
    hard_weight,
    rectified_sigmoid,
    rounding_logits,
    rounding_regulariser,
    soft_weight,
)
from torchquant.ptq.layer import Layer

NEAR = 1e-3
"""A share of the way from a level to a weight that stays below the next level."""


class LearnedRounding(WeightInTraining):
    """A weight between two levels, which moves to one of them while it is learned.

    The levels are its neighbours; where an earlier rounding has chosen a level, that one and the next towards the
    weight, three quarters of the way to the chosen one at first.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        weight, chosen = layer.weight, layer.rounded
        if chosen is None:
            self.below, self.above = layer.neighbours(weight)
            start = weight
        else:
            self.below, self.above = layer.neighbours(chosen + NEAR * (weight - chosen))
            share = torch.where(chosen == self.above, 0.75, 0.25).to(chosen.dtype)
            start = torch.lerp(self.below, self.above, share)
        self.logits = nn.Parameter(rounding_logits(start, self.below, self.above))

    def value(self) -> Tensor:
        return soft_weight(rectified_sigmoid(self.logits), self.below, self.above)

    def rounded(self) -> Tensor:
        """Return the levels that have been chosen so far."""
        return hard_weight(rectified_sigmoid(self.logits.detach()), self.below, self.above)

    def regulariser(self, beta: float) -> Tensor:
        """Return how undecided the weights are that have a choice."""
        return rounding_regulariser(rectified_sigmoid(self.logits)[self.above > self.below], beta)
