"""Learned rotations."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import Count, Positive
from torchquant.ptq.algorithms.quarot import QuaRot
from torchquant.ptq.rotating import MeasuredRotation
from torchquant.ptq.stage import PTQ


@PTQ.register("spinquant")
class SpinQuant(QuaRot):
    """Learn the rotations of `quarot` by Cayley steps, which stay orthogonal, from the best of `seeds` choices.

    What is lowered is the output error of the layers that read the channels, with weights and inputs rounded; the best
    rotation on the way is taken. `steps` at `rate`, which falls to 0: how far the first one turns, in radians.
    Deviation: the paper lowers the loss of the whole model.
    """

    source = "Liu et al. 2024, arXiv:2405.16406"
    when = "like quarot, where the random rotations of different seeds differ much: 4 bits and less"
    cost = "2 forward passes, 3 rows K n and K^3 for each step"
    needs_data = True

    def __init__(
        self, steps: Count = 100, rate: Positive = 0.05, seeds: Count = 3, online: bool = True, seed: int = 0
    ) -> None:
        super().__init__(seeds, online, seed)
        self.steps, self.rate = steps, rate

    def improved(self, one: MeasuredRotation, start: Tensor) -> Tensor:
        return one.learned(start, self.steps, self.rate)
