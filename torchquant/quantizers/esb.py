"""Elastic significant bits quantizer. Maths: quantizers_functional/esb.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About, FittedQuantizer
from torchquant.quantizers_functional._sums import row_mean_squares
from torchquant.quantizers_functional.esb import (
    ESB_ALPHA,
    check_esb,
    esb_decode,
    esb_encode,
    esb_max,
    esb_projection,
    esb_significands,
)
from torchquant.quantizers_functional.uniform import like
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("esb")
class ESBQuantizer(FittedQuantizer):
    """ESB(n_bits, significant_bits) (Gong et al. 2022, arXiv:2109.03513; docs/algorithms.md A4).

    `alpha = ESB_ALPHA[n_bits, significant_bits] * rms(x)`, optimal for Gaussian data; 1 for a tensor
    of zeros. `axis` None or the channel axis; `momentum` as in `StatisticTracker`, 0 for weights.
    Deviation from the authors' code: the gradient reaches x (theirs returns none), and e=1 formats
    use the ESB grid instead of a mid-rise one. Raises ConfigError for a pair that is no format or
    has no known optimal scale (n_bits above 9).

    >>> quantizer = ESBQuantizer(4, 1)
    >>> quantizer.force(1.0)
    >>> quantizer.levels()[7:]
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
    """

    presets = {"pot0": {"significant_bits": 0}}
    typical = "{name}:{n},k={k}/channel"
    about = About(
        formula="alpha * nearest of {0, +-F 2**-k, +-(1 + F 2**-k) 2**E}, alpha = c(n, k) rms(x)",
        paper="Gong et al. 2022, TPDS 33(11), arXiv:2109.03513",
        bits="2..9",
    )
    statistics = ("alpha",)
    short_names = {"k": "significant_bits"}

    def __init__(
        self,
        n_bits: int,
        significant_bits: int,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        check_esb(n_bits, significant_bits)
        if (n_bits, significant_bits) not in ESB_ALPHA:
            allowed = ", ".join(f"({b},{k})" for b, k in ESB_ALPHA)
            raise ConfigError(
                f"no optimal scale is known for ESB({n_bits},{significant_bits}); known: {allowed}. With a scale of "
                "your own, call esb_quantize"
            )
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.n_bits = n_bits
        self.significant_bits = significant_bits

    @property
    def code_range(self) -> tuple[int, int]:
        largest = 2 ** (self.n_bits - 1) - 1
        return -largest, largest

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        mean_squares = row_mean_squares(rows(x, self.axis))
        rms = reduce_mean(mean_squares if self.axis is not None else mean_squares.squeeze(0)).sqrt()
        largest = torch.finfo(torch.float32).max / 2 / esb_max(self.n_bits, self.significant_bits)
        alpha = (ESB_ALPHA[self.n_bits, self.significant_bits] * rms).clamp(2.0**-126, largest)
        # NaN and Inf go on as they are, for the tracker to refuse.
        return (torch.where(rms.isfinite(), torch.where(rms > 0, alpha, 1.0), rms),)

    def project(self, x: Tensor, want_inside: bool, *grid: Any) -> tuple[Tensor, Tensor | None]:
        return esb_projection(grid[0], self.n_bits, self.significant_bits)(x, want_inside)

    def codes(self, x: Tensor, *grid: Any) -> Tensor:
        return esb_encode(
            esb_significands(x, grid[0], self.n_bits, self.significant_bits), self.n_bits, self.significant_bits
        )

    def values(self, codes: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
        significands = esb_decode(codes, self.n_bits, self.significant_bits, dtype)
        return significands * like(grid[0], significands)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[ESBQuantizer]:
        """Instances that stand for the scheme in the laws."""
        return [cls(4, 1, axis, gradient_clip=True), cls(3, 0, axis), cls(8, 4, axis), cls(6, 4, axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, significant_bits={self.significant_bits}, {super().extra_repr()}"
