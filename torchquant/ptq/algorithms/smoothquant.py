"""SmoothQuant."""

from __future__ import annotations

from collections.abc import Iterable

from torchquant._arguments import Count, Share
from torchquant.ptq.functional.input_scales import smooth_candidates, smooth_scales
from torchquant.ptq.readers import Readers
from torchquant.ptq.stage import PTQ, InputStage
from torchquant.qmodule import ChannelScale, InputTransform


@PTQ.register("smoothquant")
class SmoothQuant(InputStage):
    """Divide each input channel by a scale, and multiply the weights by it, so that both are easier to quantize.

    The scales are `max|x|^alpha / max|W|^(1 - alpha)`, over all layers that read the value. `alpha`: None searches 0
    to 1 in `steps` steps, and no scales at all, by the output error of these layers with inputs and weights quantized.
    `fold`: the division is folded into the norm or the layer that gives the channels, where one forward shows that
    nothing else reads them; else it stands before the layers, and the report says why.
    """

    source = "Xiao et al. 2023, arXiv:2211.10438"
    when = "first, activations with outliers in few channels"
    cost = "21 rows K n"

    def __init__(self, alpha: Share | None = None, steps: Count = 20, fold: bool = True) -> None:
        self.alpha, self.steps, self.fold = alpha, steps, fold

    def candidates(self, readers: Readers) -> Iterable[tuple[str, InputTransform]]:
        largest = readers.input_max(), readers.weight_max()
        found = smooth_candidates(*largest, self.steps)[1:]
        if self.alpha is not None:
            found = [(self.alpha, smooth_scales(*largest, self.alpha))]
        for alpha, scales in found:
            yield f"alpha {alpha:.4g}", ChannelScale(1.0 / scales, readers.axis)
