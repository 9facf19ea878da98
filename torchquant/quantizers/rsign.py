"""Binary activations with a learned threshold (ReActNet). Maths: quantizers_functional/reactnet.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, gradient_scale, largest_of, lowest_of
from torchquant.quantizers_functional._row_statistics import row_moments
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.reactnet import ThresholdSigns, rsign_quantize
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("rsign")
class RSignQuantizer(LearnedQuantizer):
    """{-1, 1} by the sign of x - threshold, the threshold trained (Liu et al. 2020, ReActNet, arXiv:2003.03488).

    The paper has a threshold for each channel (`rsign/channel`), XNOR weights (`xnor/channel`), the activation `RPReLU`
    of `torchquant.training`, and trains on the predictions of the float model alone (`Distillation(share=1)`). The
    threshold starts at 0. Deviations: it starts at the mean where no value of the first tensor is below 0, as behind a
    ReLU, where all signs would be alike; its gradient is scaled as LSQ's step is. Raises ConfigError.

    >>> quantizer = RSignQuantizer()
    >>> quantizer.pre_observe(torch.tensor([-1.0, 0.1, 0.2]))
    >>> quantizer.set_numbers(threshold=0.15, present=1.0)
    >>> quantizer(torch.tensor([-1.0, 0.1, 0.2])).tolist()
    [-1.0, -1.0, 1.0]
    """

    n_bits = 1
    code_range = ThresholdSigns.code_range
    is_idempotent = False
    sites = ("input", "output")
    learned = ("threshold",)
    statistics = ("initial_threshold", "present")
    joined_by = {"present": "max"}
    typical = "xnor:{n}/channel"  # weights that its authors use with its activations
    typical_acts = "rsign:{n}/channel"
    about = About("sign(x - threshold), threshold learned", "Liu et al. 2020, ReActNet, arXiv:2003.03488", "1")
    initial_threshold: Tensor
    threshold: Tensor

    def __init__(self, axis: int | None = None, nonfinite: str = "raise") -> None:
        super().__init__(axis, nonfinite)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        absmax, mean = largest_of(x), row_moments(x, ranks())[0]
        threshold = torch.where(lowest_of(x) < 0, mean * 0.0, mean)
        return first((threshold, self.ever_present(absmax)), self.axis)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the threshold, and 1, or 0 for a tensor of zeros."""
        return self.number("threshold"), self.statistic("present")

    def format(self) -> Format:
        threshold, present = self.grid()
        return ThresholdSigns(present, threshold, axis=self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        threshold, present = self.grid_for(x)
        return rsign_quantize(x, threshold, present, gradient_scale(x, self.initial_threshold.numel(), True, 1))

    @classmethod
    def examples(cls, axis: int | None = None) -> list[RSignQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(axis)]
