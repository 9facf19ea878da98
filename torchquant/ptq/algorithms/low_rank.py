"""Low-rank corrections."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from torchquant._arguments import Bounds, Count, NotNegative
from torchquant.errors import ConfigError
from torchquant.ptq.functional.low_rank import loftq, low_rank_terms
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, LowRankChange


@PTQ.register("low_rank")
class LowRankCorrection(LowRankChange):
    """Make good what the rounding has lost by a float product of small rank, the best one for the layer's inputs.

    `rank`: of the product. `rounds`: 0 keeps the rounding that was chosen before, or rounds to nearest; n rounds to
    nearest and corrects n times in turns (LoftQ), which is by the weights alone.
    """

    changes = "roundings"
    source = "Yao et al. 2023, arXiv:2303.08302; Zhang et al. 2024, arXiv:2410.06040; Li et al. 2023, arXiv:2310.08659"
    when = "behind a rounding of 4 bits and less, where two small float products are affordable"
    cost = "K^3 + rows K^2"
    needs = frozenset({"gram"})

    def __init__(self, rank: Count = 32, rounds: Annotated[int, Bounds(0)] = 0, damp: NotNegative = 0.01) -> None:
        super().__init__(rank)
        self.rounds, self.damp = rounds, damp

    def terms(self, layer: Layer, data: LayerData) -> tuple[Tensor, Tensor, Tensor | None]:
        self.check_rank(layer)
        if self.rounds:
            if layer.rounded is not None:
                raise ConfigError("its weight is rounded already, which rounds > 0 would lose; take rounds=0")
            return self._in_turns(layer)
        data.check(self.damp)
        rounded = layer.quantized() if layer.rounded is None else layer.rounded
        return (*low_rank_terms(layer.weight - rounded, self.rank, data.gram, self.damp), rounded)

    def _in_turns(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
        quantizer, found = layer.quantizer, []

        def quantize(weight: Tensor) -> Tensor:
            quantizer.unpin()
            quantizer.pin(weight.reshape(layer.shape).to(layer.slot.weight.dtype))
            found.append((layer.quantized(weight), layer.numbers()))
            return found[-1][0]

        rounded, up, down = loftq(layer.weight, self.rank, quantize, self.rounds)
        numbers = next(numbers for tensor, numbers in found if tensor is rounded)
        if numbers:
            quantizer.set_numbers(**numbers)
        return up, down, rounded
