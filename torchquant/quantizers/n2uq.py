"""Nonuniform to uniform quantization (N2UQ): activations, and its weights. Maths: quantizers_functional/n2uq.py."""

from __future__ import annotations

from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, gradient_scale, or_one
from torchquant.quantizers._midrise import MidriseQuantizer
from torchquant.quantizers_functional._row_statistics import row_mean_magnitudes, row_mean_squares, usable_scale
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.lsq import NARROW_STEP
from torchquant.quantizers_functional.n2uq import UnevenCells, check_n2uq, n2uq_quantize
from torchquant.range_observers._distributed import ranks, reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("n2uq")
class N2UQQuantizer(MidriseQuantizer):
    """Mid-rise weights whose step keeps the codes equally frequent (Liu et al. 2022, N2UQ, arXiv:2111.14826, eq. 11).

    `step = 2**(2 - n_bits) E|x|`: of a bell-shaped weight each code has a like share. Its activations: `n2uq_act`.
    Raises ConfigError.

    >>> import torch
    >>> quantizer = N2UQQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, 0.2, 1.4]))
    tensor([-1.0000,  0.3333,  1.0000])
    """

    statistics = ("step",)
    has_shift = False
    typical_acts = "n2uq_act:{n}"
    about = About(
        "(floor(x / step) + 1/2) * step, step = 2**(2 - n) E|x|", "Liu et al. 2022, N2UQ, arXiv:2111.14826", "1..12"
    )

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        return (usable_scale(row_mean_magnitudes(x, ranks()) * 2.0 ** (2 - self.n_bits), 2.0**self.n_bits),)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[N2UQQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(3, axis, gradient_clip=True)]


@QUANTIZERS.register("n2uq_act")
class N2UQActQuantizer(LearnedQuantizer):
    """Trained thresholds, unevenly spaced, with even levels (Liu et al. 2022, N2UQ, arXiv:2111.14826). Codes 0..2**n-1.

    The levels are `step * code`, so that a runtime multiplies codes; only encoding looks thresholds up. The widths of
    the cells and the step are trained, and start equal, where the error is least on the positive half of a Gaussian.
    Values below 0 become 0. Deviations: one step in place of the paper's two scales; the gradients of the trained
    numbers are scaled as LSQ's step is. Raises ConfigError.

    >>> import torch
    >>> quantizer = N2UQActQuantizer(2)
    >>> quantizer.pre_observe(torch.rand(100))
    >>> quantizer.set_numbers(cells=torch.tensor([0.6, 0.8, 1.6]), step=1.0)
    >>> quantizer(torch.tensor([-0.2, 0.5, 1.3, 3.5])).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """

    is_idempotent = False
    signed = False
    sites = ("input", "output")
    learned = ("cells", "step")
    statistics = ("initial_cells", "initial_step")
    joined_by = {"initial_cells": "rms", "initial_step": "rms"}
    typical = "n2uq:{n}/channel"
    typical_acts = "n2uq_act:{n}"
    about = About(
        "step * (number of thresholds below x), thresholds and step learned",
        "Liu et al. 2022, N2UQ, arXiv:2111.14826",
        "1..4",
    )
    initial_step: Tensor
    step: Tensor
    cells: Tensor

    def __init__(self, n_bits: int, axis: int | None = None, nonfinite: str = "raise") -> None:
        check_n2uq(n_bits)
        self.widths = {"initial_cells": 2**n_bits - 1}
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.n_bits - 1

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        rms = reduce_mean(row_mean_squares(rows(x.clamp_min(0.0), self.axis))).sqrt()
        step = or_one(usable_scale(rms * (2**0.5 * NARROW_STEP[self.n_bits + 1]), 2.0**self.n_bits))
        return first((step[:, None].expand(-1, self.code_range[1]), step), self.axis)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the widths of the cells, and the step of the levels."""
        return self.bounded("cells"), self.bounded("step")

    def format(self) -> Format:
        return UnevenCells(*self.grid(), axis=self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        scale = gradient_scale(x, self.initial_step.numel(), True, self.code_range[1])
        return n2uq_quantize(x, *self.grid(), self.axis, scale)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[N2UQActQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(2, axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, {super().extra_repr()}"
