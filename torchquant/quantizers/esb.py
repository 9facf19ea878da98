"""Elastic significant bits quantizer. Maths: quantizers_functional/esb.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._row_statistics import row_mean_squares, row_moments
from torchquant.quantizers_functional.esb import ESB_ALPHA, ESB_FORMS, check_esb
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.minifloat import FloatFormat, ScaledFloat
from torchquant.range_observers._distributed import ranks, reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("esb")
class ESBQuantizer(ScaledQuantizer):
    """ESB(n_bits, significant_bits) (Gong et al. 2022, arXiv:2109.03513; docs/algorithms.md A4).

    `alpha = ESB_ALPHA[n_bits, significant_bits] * rms(x)`, optimal for Gaussian data; 1 for a tensor
    of zeros. `center` takes the mean out of x and puts it back onto the levels, and the standard deviation
    for the rms. `axis` None or the channel axis; `momentum` as in `StatisticTracker`, 0 for weights.
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
    statistics: tuple[str, ...] = ("alpha",)
    joined_by = {"alpha": "rms"}
    short_names = {"k": "significant_bits"}
    scale_of_zeros = 1.0

    def __init__(
        self,
        n_bits: int,
        significant_bits: int,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
        center: bool = False,
    ) -> None:
        check_esb(n_bits, significant_bits)
        if (n_bits, significant_bits) not in ESB_ALPHA:
            allowed = ", ".join(f"({b},{k})" for b, k in ESB_ALPHA)
            raise ConfigError(
                f"no optimal scale is known for ESB({n_bits},{significant_bits}); known: {allowed}. With a scale of "
                "your own, call esb_quantize"
            )
        if center:
            self.statistics = ("alpha", "shift")
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.center = center
        self.n_bits = n_bits
        self.significant_bits = significant_bits

    @property
    def _float_format(self) -> FloatFormat:
        return ESB_FORMS[self.n_bits, self.significant_bits]

    @property
    def code_range(self) -> tuple[int, int]:
        return self._float_format.code_range

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        if self.center:
            shift, size = row_moments(x, ranks())
        else:
            shift, size = None, reduce_mean(row_mean_squares(x)).sqrt()
        largest = torch.finfo(torch.float32).max / 2 / self._float_format.largest
        alpha = (ESB_ALPHA[self.n_bits, self.significant_bits] * size).clamp(2.0**-126, largest)
        # NaN and Inf are passed on, for the tracker to refuse.
        alpha = torch.where(size.isfinite(), torch.where(size > 0, alpha, 1.0), size)
        found = (alpha,) if shift is None else (alpha, shift)
        return found if self.axis is not None else tuple(number.squeeze(0) for number in found)

    @property
    def has_shift(self) -> bool:  # type: ignore[override]
        return self.center

    def numbers_at(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (scale, shift) if self.center else (scale,)

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        alpha, *shift = numbers
        return ScaledFloat(alpha, self._float_format, shift=shift[0] if shift else None, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[ESBQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, 1, axis, gradient_clip=True), cls(3, 0, axis), cls(8, 4, axis), cls(4, 1, axis, center=True)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, significant_bits={self.significant_bits}, {super().extra_repr()}"
