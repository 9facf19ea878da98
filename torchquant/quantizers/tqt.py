"""Trained quantization thresholds. Maths: quantizers_functional/tqt.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedUniform, first, lowest_of, or_one, where_signed
from torchquant.quantizers_functional._row_statistics import row_mean_squares, row_moments, usable_scale
from torchquant.quantizers_functional.lsq import FULL_STEP, NARROW_STEP, lsq_codes
from torchquant.quantizers_functional.tqt import tqt_quantize, tqt_step
from torchquant.range_observers._distributed import ranks, reduce_max, reduce_mean
from torchquant.range_observers._statistics import per_channel_view, rows

INITS = ("mse", "3sigma", "absmax")


@QUANTIZERS.register("tqt")
class TQTQuantizer(LearnedUniform):
    """A power-of-two step that is trained: Q-format with a learned point (Jain et al. 2019, arXiv:1903.08066).

    The parameter is `log2_t`, the logarithm of the threshold; the step is `2**ceil(log2_t) / 2**(n_bits - 1)`, or
    `/ 2**n_bits` if unsigned. `signed` None: the first tensor decides. `init`: "mse", the power of two nearest to
    the optimal step for a Gaussian of that size; "3sigma" (paper, weights), the threshold at three standard
    deviations; "absmax". Train it with Adam, learning rate 1e-2 (paper). docs/algorithms.md B10. Raises ConfigError.

    >>> quantizer = TQTQuantizer(8, init="absmax")
    >>> quantizer.pre_observe(torch.tensor([-0.9, 0.3]))
    >>> quantizer(torch.tensor([-0.9, 0.3, 2.0]))
    tensor([-0.8984,  0.2969,  0.9922], grad_fn=<_TrainedThresholdBackward>)
    """

    learned = ("log2_t",)
    statistics = ("initial_log2_t", "lowest")
    joined_by = {"initial_log2_t": "max", "lowest": "min"}
    typical_acts = "tqt:{n}"
    about = About(
        "step * clamp(RHE(x / step)), step = 2**ceil(log2_t) / 2**(n-1)", "Jain et al. 2019, arXiv:1903.08066", "2..11"
    )
    initial_log2_t: Tensor
    log2_t: Tensor

    def __init__(
        self,
        n_bits: int,
        signed: bool | None = True,
        init: str = "mse",
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        for sign in (True, False) if signed is None else (signed,):
            lsq_codes(n_bits, sign)
        if init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits
        self.signed = signed
        self.init = init

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        lowest = lowest_of(x)
        if self.init == "absmax":
            threshold = torch.maximum(-lowest, reduce_max(x.amax(1))).to(torch.float64)
        elif self.init == "mse":
            half_codes = 2 ** (self.n_bits - 1)
            steps = FULL_STEP[self.n_bits], 2**1.5 * NARROW_STEP.get(self.n_bits + 1, 1.0)
            threshold = reduce_mean(row_mean_squares(x)).sqrt() * half_codes
            # 2**ceil(log2(t / sqrt 2)) is the power of two nearest to t on a logarithmic scale.
            threshold = threshold * where_signed(self.signed, lowest, *steps) / 2**0.5
        else:
            mean, deviation = row_moments(x, ranks())
            threshold = mean.abs() + 3 * deviation
        threshold = or_one(usable_scale(threshold, 4.0))
        return first((threshold.log2(), lowest), self.axis)

    def grid(self) -> tuple[Tensor | int, ...]:
        """Return the step."""
        self.get()
        return (tqt_step(self._log2_t, self.n_bits, self.is_signed),)

    @property
    def _log2_t(self) -> Tensor:
        """The logarithm of the threshold, where its step is a normal number of float32."""
        return self.number("log2_t").clamp(self.n_bits - 126.0, 120.0)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.get()
        log2_t = per_channel_view(self._log2_t, x.ndim, self.axis)
        return tqt_quantize(x, log2_t, self.n_bits, self.is_signed)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[TQTQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, axis=axis), cls(8, init="absmax", axis=axis), cls(3, init="3sigma", axis=axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, signed={self.signed}, init={self.init!r}, {super().extra_repr()}"
