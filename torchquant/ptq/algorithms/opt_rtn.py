"""Clipped ranges by weighted errors of the weights."""

from __future__ import annotations

from torch import Tensor

from torchquant.ptq.algorithms.clip import Clip
from torchquant.ptq.layer import LayerData
from torchquant.ptq.stage import PTQ


@PTQ.register("opt_rtn")
class OptRTN(Clip):
    """Shrink ranges as `clip` does, by the squared error of each weight times the mean square of its input."""

    source = "importance matrices of llama.cpp; opt-rtn of AutoRound"
    when = "like clip, where the products of inputs are not to be trusted: few rows"

    def importance(self, data: LayerData) -> Tensor:
        return data.gram.diagonal(dim1=-2, dim2=-1)
