"""Binary weights that are standardized first (IR-Net). Maths: quantizers_functional/irnet.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About, FittedQuantizer
from torchquant.quantizers._learned import first
from torchquant.quantizers_functional.binary import binary_codes
from torchquant.quantizers_functional.irnet import irnet_params, irnet_quantize, standardized
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("irnet")
class IRNetQuantizer(FittedQuantizer):
    """{-2**s, 2**s} by the sign of the standardized weight (Qin et al. 2020, IR-Net, arXiv:1909.10788).

    Weights lose their units, as with `dorefa`: the levels are near +-1 whatever their scale, so a batch norm should
    follow. Activations of the paper: `bnn`, in a network without ReLU. Its gradient is "ede", with t from 0.1 to 10:
    `GradientSchedule(model, "ede", t=Ramp(0.1, 10.0, n_steps, "geometric"))`. Deviations: mean and deviation are
    constants for the gradient, and the deviation is that of all n weights, not over n - 1. Raises ConfigError.

    >>> quantizer = IRNetQuantizer()
    >>> quantizer.pre_observe(torch.tensor([-0.1, 0.1, 0.2, 0.4]))
    >>> quantizer(torch.tensor([-0.1, 0.1, 0.2, 0.4]))
    tensor([-1., -1.,  1.,  1.])
    """

    n_bits = 1
    code_range = (0, 1)
    is_idempotent = False
    sites = ("weight",)
    traits = frozenset({"sign"})
    statistics = ("mean", "deviation", "scale")
    joined_by = {"deviation": "rms"}
    typical_acts = "bnn:{n}@ede"
    about = About("2**s sign(w - mean), s = RHE(log2 E|w - mean| / std)", "Qin et al. 2020, arXiv:1909.10788", "1")

    def __init__(self, axis: int | None = None, momentum: float = 0.0, nonfinite: str = "raise") -> None:
        super().__init__(momentum, axis, False, nonfinite)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        return first(irnet_params(rows(x, self.axis), ranks()), self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mean, deviation, scale = self.grid_for(x)
        return irnet_quantize(x, mean, deviation, scale, self.gradient, self.training)

    def codes(self, x: Tensor, *grid: Any) -> Tensor:
        mean, deviation, _ = (number.to(x.dtype) for number in grid)
        return binary_codes(standardized(x, mean, deviation))

    def values(self, codes: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
        return (codes.to(dtype) * 2.0 - 1.0) * grid[2].to(dtype)

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        mean, deviation, _ = self.grid_for(values)
        return (values.sign() * deviation + mean).to(values.dtype)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[IRNetQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(axis)]
