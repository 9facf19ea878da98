"""Trained ternary quantization. Maths: quantizers_functional/ttq.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, largest_of, or_one
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.ternary import ternary_params
from torchquant.quantizers_functional.ttq import TernaryPair, ttq_quantize
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("ttq")
class TTQQuantizer(LearnedQuantizer):
    """{-negative, 0, positive} with two trained scales (Zhu et al. 2017, arXiv:1612.01064; docs/algorithms.md A7).

    The threshold is `t` times the largest |w| of the tensor observed last (paper: 0.05). Both scales start at the
    scale of ternary weight networks. For weights. Stored in 2 bits. Raises ConfigError.

    >>> quantizer = TTQQuantizer(t=0.5)
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, -0.5, 1.4])).tolist()
    [-0.925000011920929, 0.0, 0.925000011920929]
    """

    n_bits = 2
    code_range = TernaryPair.code_range
    sites = ("weight",)
    learned = ("positive", "negative")
    statistics = ("initial_positive", "initial_negative", "threshold")
    joined_by = {"threshold": "max"}
    about = About(
        "positive where w > t max|w|, -negative where w < -t max|w|, else 0", "Zhu et al. 2017, arXiv:1612.01064", "2"
    )

    def __init__(self, t: float = 0.05, axis: int | None = None, nonfinite: str = "raise") -> None:
        if not 0.0 < t < 1.0:
            raise ConfigError(f"t must be between 0 and 1, got {t!r}")
        super().__init__(axis, nonfinite)
        self.t = t

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        absmax = largest_of(x).to(torch.float64)
        alpha = or_one(ternary_params(x, "twn", ranks())[1])
        return first((alpha, alpha, self.t * absmax), self.axis)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the threshold, and the positive and negative scale in use."""
        return self.statistic("threshold"), self.bounded("positive"), self.bounded("negative")

    def format(self) -> Format:
        threshold, positive, negative = self.grid()
        return TernaryPair(threshold, positive, negative, axis=self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return ttq_quantize(x, *self.grid_for(x))

    @classmethod
    def examples(cls, axis: int | None = None) -> list[TTQQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(axis=axis), cls(0.1, axis=axis)]
