"""SVDQuant."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import Count, NotNegative
from torchquant.ptq.functional.low_rank import low_rank_terms
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, LowRankChange


@PTQ.register("svdquant")
class SVDQuant(LowRankChange):
    """Take the part of small rank that the outputs depend on most out of the weight, and leave the rest to be rounded.

    `rank`: of the part, which stays float. It is the best one for the layer's inputs; the paper takes the singular
    vectors of the weight behind SmoothQuant, which `smoothquant` before it brings near.
    """

    changes = "weights"
    source = "Li et al. 2024, arXiv:2411.05007"
    when = "behind smoothquant, before a rounding at 4 bits of weights and activations"
    cost = "K^3 + rows K^2"
    needs = frozenset({"gram"})

    def __init__(self, rank: Count = 32, damp: NotNegative = 0.01) -> None:
        super().__init__(rank)
        self.damp = damp

    def terms(self, layer: Layer, data: LayerData) -> tuple[Tensor, Tensor, Tensor | None]:
        self.check_rank(layer)
        data.check(self.damp)
        return (*low_rank_terms(layer.weight, self.rank, data.gram, self.damp), None)
