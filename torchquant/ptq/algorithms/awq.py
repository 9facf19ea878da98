"""AWQ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from torchquant._arguments import Bounds
from torchquant.ptq.functional.input_scales import awq_candidates
from torchquant.ptq.readers import Readers
from torchquant.ptq.stage import PTQ, InputStage
from torchquant.qmodule import ChannelScale, InputTransform


@PTQ.register("awq")
class AWQ(InputStage):
    """Multiply the weights of channels with large inputs by a scale, so that their rounding errors count less.

    The scales are `mean|x|^rho`, with rho searched from 0 to 1 in `steps` steps by the output error of all layers that
    read the value. Deviation: inputs are quantized too where the plan does so. Its search of clipped ranges is the
    stage `clip`, behind it. `fold`: the inputs are divided by the norm or the layer that gives them, where one forward
    shows that nothing else reads the channels; else before the layers, and the report says why.
    """

    source = "Lin et al. 2024, arXiv:2306.00978"
    when = "first, weights at 4 bits and less"
    cost = "20 rows K n"

    def __init__(self, steps: Annotated[int, Bounds(2)] = 20, fold: bool = True) -> None:
        self.steps, self.fold = steps, fold

    def candidates(self, readers: Readers) -> Iterable[tuple[str, InputTransform]]:
        for rho, scales in awq_candidates(readers.input_mean(), self.steps)[1:]:
            yield f"rho {rho:.4g}", ChannelScale(1.0 / scales, readers.axis)
