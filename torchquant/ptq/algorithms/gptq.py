"""GPTQ."""

from __future__ import annotations

from torch import Tensor

from torchquant._arguments import Count, NotNegative
from torchquant.ptq.functional.columns import activation_order, gptq
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, MatchingRounding


@PTQ.register("gptq")
class GPTQ(MatchingRounding):
    """Second-order rounding, column by column, each error made good in the columns that follow.

    On any grid. `damp`: in units of the mean diagonal of the Gram matrix; None for 0.01, or more for few rows, see
    `damping_of`. `act_order`: columns with the largest inputs first. With match="float" the target is the corrected
    weight of `corrected_weight`, which is GPTAQ at once. Scales of groups and blocks are those of the weight before
    rounding.
    """

    source = "Frantar et al. 2023, arXiv:2210.17323; Li et al. 2025, arXiv:2504.02692"
    when = "4 bits and less, any layer; the first to try"
    cost = "K^3 + rows K^2"

    def __init__(
        self, match: str = "float", damp: NotNegative | None = None, act_order: bool = False, block: Count = 128
    ) -> None:
        super().__init__(match)
        self.damp, self.act_order, self.block = damp, act_order, block

    def round(self, layer: Layer, data: LayerData) -> Tensor:
        damp = data.damping if self.damp is None else self.damp
        data.check(damp)
        order = activation_order(data.gram) if self.act_order else None
        if order is not None and layer.quantizer.columns_differ:  # the numbers of a column follow from its place
            order = activation_order(data.gram.mean(0)).expand(order.shape)
        return gptq(self.target(layer, data), data.gram, layer.nearest, order, damp, block=self.block)
