"""Codebook quantizer (Lloyd-Max, k-means). Maths: quantizers_functional/codebook.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer
from torchquant.quantizers._level_list import LevelList
from torchquant.quantizers_functional.codebook import codebook_quantize, lloyd_max
from torchquant.range_observers._distributed import gather_rows
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("codebook")
class CodebookQuantizer(LevelList, LearnedQuantizer):
    """2**n_bits levels of least squared error on the data: Lloyd-Max, or k-means in one dimension; A10.

    They are fitted to the tensor observed last; with `learn` to the first one, after which the optimizer moves them.
    `zero` keeps one level at 0. `iterations` counts those of Lloyd's algorithm. Ranks of torch.distributed gather
    their tensors. The grid is not uniform, so no integer runtime multiplies with it: codes index a table. Raises
    ConfigError.

    >>> quantizer = CodebookQuantizer(1)
    >>> quantizer.pre_observe(torch.tensor([1.0, 1.1, 5.0, 5.2]))
    >>> quantizer(torch.tensor([0.0, 4.0]))
    tensor([1.0500, 5.1000])
    """

    statistics = ("initial_codebook",)
    about = About("nearest of 2**n fitted levels", "Max 1960; Lloyd 1982; Han et al. 2016, arXiv:1510.00149", "1..8")
    typical = "{name}:{n},iterations=20/channel"  # in training it is fitted again at every step
    presets = {"lloyd": {"zero": False, "learn": False}}
    codebook: Tensor

    def __init__(
        self,
        n_bits: int,
        zero: bool = False,
        learn: bool = False,
        iterations: int = 100,
        axis: int | None = None,
        momentum: float = 0.0,
        nonfinite: str = "raise",
    ) -> None:
        if not (isinstance(n_bits, int) and 1 <= n_bits <= 8):
            raise ConfigError(f"n_bits must be a whole number from 1 to 8, got {n_bits!r}")
        if not (isinstance(iterations, int) and iterations >= 1):
            raise ConfigError(f"iterations must be a whole number from 1, got {iterations!r}")
        self.widths = {"initial_codebook": 2**n_bits}
        self.learned = ("codebook",) if learn else ()
        super().__init__(axis, nonfinite, momentum)
        self.n_bits = n_bits
        self.zero = zero
        self.iterations = iterations

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = gather_rows(rows(x, self.axis))
        levels = lloyd_max(x, 2**self.n_bits, self.iterations, self.zero)
        levels = torch.where(x.isfinite().all(1, keepdim=True), levels, torch.full_like(levels, torch.nan))
        return (levels if self.axis is not None else levels.squeeze(0),)

    def level_list(self) -> Tensor:
        (fitted,) = self.get()
        return self.codebook.sort(-1).values if self.learned else fitted

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return codebook_quantize(x, self.level_list(), self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[CodebookQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(3, iterations=10, axis=axis), cls(2, zero=True, learn=True, iterations=10, axis=axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, zero={self.zero}, learn={bool(self.learned)}, {super().extra_repr()}"
