"""Multi-bit binary quantizer (ResQ). Maths: quantizers_functional/residual.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About, FittedQuantizer
from torchquant.quantizers._level_list import LevelList
from torchquant.quantizers_functional._gradient import compute_dtype
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.residual import SignSums, check_residual, residual_alphas, residual_levels
from torchquant.range_observers._distributed import ranks, reduce_max
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("residual")
class ResidualQuantizer(LevelList, FittedQuantizer):
    """x as a sum of `n_bits` scaled sign tensors: the levels are all sums +-a_1 +-a_2 ...; docs/algorithms.md A9.

    `method`: "alternating" (Xu et al. 2018), "refined", or "greedy", the published one, which stops gaining after four
    bits. Every element takes the nearest sum, in training and afterwards: greedy signs with stored scales would
    not give the nearest. Codes count the sums from the lowest. `lqnets` averages the scales over batches, one refit for
    each (Zhang et al. 2018, LQ-Nets, arXiv:1807.10029; deviation: a batch starts from greedy scales, where the paper
    starts from the average). Raises ConfigError.

    >>> quantizer = ResidualQuantizer(2)
    >>> quantizer.force(torch.tensor([2.0, 0.5]))
    >>> quantizer(torch.tensor([-9.0, 0.3, 2.1]))
    tensor([-2.5000,  1.5000,  2.5000])
    """

    statistics = ("alphas",)
    joined_by = {"alphas": "rms"}
    presets = {"resq": {"method": "greedy"}, "lqnets": {"method": "alternating", "iterations": 1, "momentum": 0.9}}
    about = About(
        "sum of a_i sign_i, scales by least squares",
        "Guo et al. 2017, arXiv:1706.02021; Xu et al. 2018, arXiv:1802.00150",
        "1..8",
    )

    def __init__(
        self,
        n_bits: int,
        method: str = "alternating",
        iterations: int = 5,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        check_residual(n_bits, method)
        self.widths = {"alphas": n_bits}
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.n_bits = n_bits
        self.method = method
        self.iterations = iterations

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        bounded = x.to(compute_dtype(x)).clamp(-1e38, 1e38).nan_to_num(0.0)
        alphas = residual_alphas(bounded, self.n_bits, self.method, self.iterations, ranks())
        usable = reduce_max(x.abs().amax(1)).isfinite()[:, None]
        alphas = torch.where(usable, alphas, torch.full_like(alphas, torch.nan))
        return (alphas if self.axis is not None else alphas.squeeze(0),)

    def level_list(self) -> Tensor:
        return residual_levels(self.get()[0])

    def format(self) -> Format:
        return SignSums.of(self.get()[0], self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[ResidualQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(3, axis=axis, gradient_clip=True), cls(3, "greedy", axis=axis), cls(2, "refined", axis=axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, method={self.method!r}, {super().extra_repr()}"
