"""Learned step size quantizer. Maths: quantizers_functional/lsq.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About, FittedQuantizer
from torchquant.quantizers_functional._sums import row_mean_squares, row_sums, unit_rows, usable_scale
from torchquant.quantizers_functional.affine import AffineParams
from torchquant.quantizers_functional.lsq import FULL_STEP, NARROW_STEP, lsq_codes, lsq_quantize
from torchquant.quantizers_functional.uniform import uniform_codes
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import rows

INITS = ("mse", "paper")


@QUANTIZERS.register("lsq")
class LSQQuantizer(FittedQuantizer):
    """A uniform grid through 0 whose step is trained (Esser et al. 2020, arXiv:1902.08153; docs/algorithms.md B5).

    The first tensor observed sets the step; from then on observing changes nothing and the optimizer moves it.
    `init="mse"`: the step of least squared error on Gaussian data of that size (on its positive half if
    unsigned), or "paper": `2 E|x| / sqrt(Qp)`, 19 times the error at 8 bits. `signed` codes or not: not after a
    ReLU. The step's gradient is scaled by `1 / sqrt(N Qp)`, N the elements that share a step, or those of
    one sample if `per_sample` (activations). A step is never used below a thousandth of its first value, so
    it stays positive. `torchquant.quantizer_parameters(model)` is an optimizer group without weight decay; build
    the optimizer after calibration where steps per group, or per channel of an activation, get their number only
    then. Raises ConfigError.

    >>> quantizer = LSQQuantizer(4)
    >>> quantizer.pre_observe(torch.randn(1000))
    >>> quantizer(torch.randn(8)).sum().backward()
    >>> quantizer.step.grad.shape
    torch.Size([])
    """

    statistics = ("initial_step",)
    about = About("step * RHE(clamp(x / step)), step learned", "Esser et al. 2020, LSQ, arXiv:1902.08153", "1..12")
    initial_step: Tensor

    def __init__(
        self,
        n_bits: int,
        signed: bool = True,
        init: str = "mse",
        per_sample: bool = False,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        lsq_codes(n_bits, signed)
        if init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        super().__init__(0.0, axis, False, nonfinite)
        self.n_bits = n_bits
        self.signed = signed
        self.init = init
        self.per_sample = per_sample
        self.step = nn.Parameter(torch.ones_like(self.initial_step))

    @property
    def code_range(self) -> tuple[int, int]:
        return lsq_codes(self.n_bits, self.signed)

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """None to choose from: the step's own."""
        return ()

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        if self.init == "mse":
            rms = reduce_mean(row_mean_squares(x)).sqrt()
            step = rms * (FULL_STEP[self.n_bits] if self.signed else 2**0.5 * NARROW_STEP[self.n_bits + 1])
        else:
            units, unit = unit_rows(x)
            mean = reduce_mean(row_sums(units.abs_()) / units.shape[1] * unit)
            step = 2.0 * mean / self.code_range[1] ** 0.5
        step = usable_scale(step, 2.0**self.n_bits)
        step = torch.where(step == 0, torch.ones_like(step), step)
        return (step if self.axis is not None else step.squeeze(0),)

    def _observe(self, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        if not self.is_observed:
            super()._observe(x, measure)
            self._start()

    def force(self, *values: Tensor | float) -> None:
        """Set the step by hand, () or (C,)."""
        super().force(*values)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        if self.is_observed:
            self.step.copy_(self.initial_step)

    def _resize(self, shape: tuple[int, ...] | torch.Size) -> None:
        super()._resize(shape)
        if self.step.shape != torch.Size(shape):
            self.step = nn.Parameter(self.step.new_ones(shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LSQQuantizer:
        """Follow device moves and `.double()`; the step stays at float32 under `.half()`, as its statistics do."""
        before = self.step.data
        super()._apply(fn, recurse)
        if self.step.dtype in (torch.float16, torch.bfloat16):
            self.step.data = before.to(device=self.step.device, dtype=torch.float32)
        return self

    def grid(self) -> tuple[Tensor | int, ...]:
        """The step in use: never below its floor, with the gradient passing through that bound."""
        (initial,) = self.get()
        floor = (initial * 1e-3).clamp_min(2.0**-126)
        return (self.step + (torch.maximum(self.step, floor) - self.step).detach(),)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (step,) = self._grid_for(x.ndim, self.axis)
        sharing = x.numel() / (len(x) if self.per_sample and x.ndim else self.initial_step.numel())
        scale = 1.0 / (max(sharing, 1.0) * self.code_range[1]) ** 0.5
        return lsq_quantize(x, step, self.n_bits, self.signed, scale)

    def codes(self, x: Tensor, *grid: Any) -> Tensor:
        return uniform_codes(x, grid[0], *self.code_range)

    def values(self, codes: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
        return codes.to(dtype) * grid[0].to(dtype)

    def affine_params(self) -> AffineParams:
        (step,) = self.grid()
        assert isinstance(step, Tensor)
        return AffineParams(step.detach(), 0, *self.code_range)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[LSQQuantizer]:
        """Instances that stand for the scheme in the laws."""
        return [cls(4, axis=axis), cls(8, axis=axis, init="paper"), cls(2, axis=axis)]

    def extra_repr(self) -> str:
        sign = "signed" if self.signed else "unsigned"
        return f"n_bits={self.n_bits}, {sign}, init={self.init!r}, {super().extra_repr()}"
