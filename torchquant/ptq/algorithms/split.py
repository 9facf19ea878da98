"""Outlier channel splitting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

from torchquant._arguments import Bounds, Count
from torchquant.errors import ConfigError
from torchquant.ptq.functional.input_scales import split_index
from torchquant.ptq.readers import Readers
from torchquant.ptq.stage import PTQ, InputStage
from torchquant.qmodule import ChannelSplit, InputTransform


@PTQ.register("split")
class ChannelSplitting(InputStage):
    """Give the layers the input channels with the largest weights twice, with half of the weights each.

    The range of the weights gets smaller, and the layers larger. `ratio`: by how much at most; in `steps` steps up to
    it, that of least output error is taken. Deviation: both halves are the same real weight; the paper moves them apart
    so that they round to what the whole would, which gptq behind it does by making one good for the other.
    """

    source = "Zhao et al. 2019, arXiv:1901.09504"
    when = "first, large outliers in few weights that have one scale for the whole tensor"
    cost = "5 rows K n"

    def __init__(self, ratio: Annotated[float, Bounds(above=0, most=1)] = 0.05, steps: Count = 4) -> None:
        self.ratio, self.steps = ratio, steps

    def candidates(self, readers: Readers) -> Iterable[tuple[str, InputTransform]]:
        n_channels = readers.n_channels
        if readers.n_groups > 1:
            raise ConfigError("the groups of a grouped layer would differ in size")
        most, largest = self.ratio * n_channels, readers.weight_max()
        for n in sorted({math.ceil(most * step / self.steps) for step in range(1, self.steps + 1)}):
            yield f"{n} of {n_channels} channels split", ChannelSplit(split_index(largest, n), readers.axis)
