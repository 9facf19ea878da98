"""torchquant: the library this repository is."""

from __future__ import annotations

from torch import nn

from benchmarks.adapters.base import ESB, QFMT, TERNARY, Adapter, ObserveAndQuantize
from torchquant.quantizers import (
    AffineQuantizer,
    ESBQuantizer,
    QfmtQuantizer,
    Quantizer,
    TernaryQuantizer,
    make_quantizer,
)
from torchquant.range_observers import BatchMinMax, ExpAvgMinMax


class TorchquantAdapter(Adapter):
    """`observer`: the name of the observer of activations."""

    name = "torchquant"

    def __init__(self, observer: str = "ema") -> None:
        self.observer = observer

    def weight_quantizer(self, layer: nn.Module) -> Quantizer:
        return AffineQuantizer(8, BatchMinMax(axis=0), symmetric="narrow", gradient_clip=True)

    def acts_quantizer(self, layer: nn.Module) -> Quantizer:
        return make_quantizer(f"affine:8,gradient_clip,observer={self.observer}", "output")

    def fake_quant(self, case: str, layer: nn.Module) -> nn.Module | None:
        if case == ESB:
            return ObserveAndQuantize(ESBQuantizer(4, 1, gradient_clip=True))
        if case == TERNARY:
            return ObserveAndQuantize(TernaryQuantizer(gradient_clip=True))
        if case == QFMT:
            return ObserveAndQuantize(QfmtQuantizer(8, True, ExpAvgMinMax(), gradient_clip=True))
        return super().fake_quant(case, layer)
