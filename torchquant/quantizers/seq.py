"""Stretched elastic quantization (ParetoQ). Maths: quantizers_functional/seq.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, gradient_scale, largest_of, or_one
from torchquant.quantizers_functional._row_statistics import row_mean_magnitudes, usable_scale
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.seq import check_seq, seq_format, seq_quantize
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("seq")
class SEQQuantizer(LearnedQuantizer):
    """Levels in the middle of equal cells over a trained range (Liu et al. 2025, ParetoQ, arXiv:2502.02631).

    `alpha (k + 1/2) / n` with `n = 2**(n_bits - 1)`, no level at 0; `ternary`: {-2/3, 0, 2/3} alpha; at 1 bit
    `alpha sign(x)`. alpha starts at max|x|, at 1 bit at the mean of |x|, and takes LSQ's gradient. The paper uses it
    for weights of 1 to 2 bits, and LSQ above. Deviations: see `seq_quantize`. Raises ConfigError.

    >>> quantizer = SEQQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([0.62, -0.41, 0.1, 0.9]))
    >>> quantizer(torch.tensor([0.62, -0.41, 0.1, 0.9])).tolist() == quantizer.levels()[[3, 1, 2, 3]].tolist()
    True
    """

    learned = ("alpha",)
    statistics = ("initial_alpha", "present")
    joined_by = {"initial_alpha": "max", "present": "max"}
    about = About(
        "alpha (floor(n x / alpha) + 1/2) / n, n = 2**(bits - 1), or alpha RHE(1.5 x / alpha) / 1.5; alpha learned",
        "Liu et al. 2025, ParetoQ, arXiv:2502.02631",
        "1..7",
    )
    initial_alpha: Tensor
    alpha: Tensor

    def __init__(self, n_bits: int, ternary: bool = False, axis: int | None = None, nonfinite: str = "raise") -> None:
        check_seq(n_bits, ternary)
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits
        self.ternary = ternary

    @property
    def code_range(self) -> tuple[int, int]:
        return seq_format(torch.ones(()), self.n_bits, self.ternary).code_range

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        absmax = largest_of(x)
        alpha = row_mean_magnitudes(x, ranks()) if self.n_bits == 1 else absmax.to(torch.float64)
        return first((or_one(usable_scale(alpha, 2.0**self.n_bits)), self.ever_present(absmax)), self.axis)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the alpha in use, and whether there is anything but zeros."""
        return self.bounded("alpha"), self.statistic("present")

    def format(self) -> Format:
        alpha, present = self.grid()
        return seq_format(alpha, self.n_bits, self.ternary, present, self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        alpha, present = self.grid_for(x)
        scale = gradient_scale(x, self.initial_alpha.numel(), False, 1)
        return seq_quantize(x, alpha, self.n_bits, self.ternary, scale, present)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[SEQQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(2, axis=axis), cls(2, True, axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, ternary={self.ternary}, {super().extra_repr()}"
