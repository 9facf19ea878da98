"""Additive powers of two with a trained clip. Maths: quantizers_functional/apot.py."""

from __future__ import annotations

from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, check_init, first, lowest_of, or_one, where_signed
from torchquant.quantizers_functional._row_statistics import row_mean_squares, usable_scale
from torchquant.quantizers_functional.apot import (
    APOT_ALPHA,
    AdditivePowers,
    apot_code_range,
    apot_quantize,
    check_apot,
)
from torchquant.quantizers_functional.formats import Format
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("apot")
class APoTQuantizer(LearnedQuantizer):
    """Levels that are sums of powers of two, with a trained clip (Li et al. 2020, arXiv:1909.13144; A6 and RCF).

    The largest level is `alpha * scale`, alpha trained, scale the root mean square: of the tensor observed last if
    `normalize` (weights), of the first one otherwise (activations). `signed` None: the first tensor decides.
    `init="mse"`: the alpha of least error on a Gaussian; "paper": 3.0 with sign, 8.0 without. Deviation from the
    paper: the weights keep their units and their mean, whereas the paper normalizes them. Raises ConfigError.

    >>> import torch
    >>> quantizer = APoTQuantizer(4, init="paper")
    >>> quantizer.pre_observe(torch.tensor([-1.0, 1.0]))
    >>> quantizer(torch.tensor([-0.3, 0.52, 9.0])).tolist()
    [-0.30000001192092896, 0.6000000238418579, 3.0]
    """

    learned = ("alpha",)
    statistics = ("initial_alpha", "lowest", "scale")
    joined_by = {"lowest": "min", "scale": "rms"}
    typical_acts = "apot:{n}"
    about = About(
        "alpha * rms * nearest sum of powers of two, alpha learned",
        "Li et al. 2020, APoT, arXiv:1909.13144",
        "2..7 (1..6)",
    )

    def __init__(
        self,
        n_bits: int,
        signed: bool | None = True,
        init: str = "mse",
        normalize: bool = True,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        for sign in (True, False) if signed is None else (signed,):
            check_apot(n_bits, sign)
        check_init(init)
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits
        self.signed = signed
        self.init = init
        self.normalize = normalize
        if not normalize:
            self.set_once = frozenset(self.statistics)

    @property
    def code_range(self) -> tuple[int, int]:
        return apot_code_range(self.n_bits, self.is_signed)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        lowest = lowest_of(x)
        starts = APOT_ALPHA[self.n_bits], 2**0.5 * APOT_ALPHA.get(self.n_bits + 1, 1.0)
        start = where_signed(self.signed, lowest, *(starts if self.init == "mse" else (3.0, 8.0)))
        scale = or_one(usable_scale(reduce_mean(row_mean_squares(x)).sqrt(), 16.0))
        return first((start.expand_as(scale), lowest, scale), self.axis)

    def grid(self) -> tuple[Tensor]:
        """Return the largest level."""
        return (self.bounded("alpha") * self.statistic("scale"),)

    def format(self) -> Format:
        return AdditivePowers(*self.grid(), self.n_bits, self.is_signed, axis=self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (clip,) = self.grid_for(x)
        return apot_quantize(x, clip, self.n_bits, self.is_signed)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[APoTQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, axis=axis), cls(3, False, normalize=False, axis=axis), cls(7, init="paper", axis=axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, signed={self.signed}, init={self.init!r}, {super().extra_repr()}"
