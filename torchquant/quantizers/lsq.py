"""Learned step sizes: LSQ and LSQ+. Maths: quantizers_functional/lsq.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import (
    LearnedQuantizer,
    LearnedUniform,
    check_init,
    first,
    gradient_scale,
    lowest_of,
    or_one,
    scaled_gradient,
    where_signed,
)
from torchquant.quantizers_functional._range_search import best_range, refitted_step
from torchquant.quantizers_functional._row_statistics import (
    row_mean_magnitudes,
    row_mean_squares,
    row_moments,
    row_sums,
    unit_rows,
    usable_scale,
)
from torchquant.quantizers_functional.formats import Format, UniformGrid
from torchquant.quantizers_functional.lsq import FULL_STEP, NARROW_STEP, lsq_codes, lsq_quantize
from torchquant.quantizers_functional.uniform import integer_codes
from torchquant.range_observers._distributed import ranks, reduce_max, reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("lsq")
class LSQQuantizer(LearnedUniform):
    """A uniform grid through 0 whose step is trained (Esser et al. 2020, arXiv:1902.08153; docs/algorithms.md B5).

    The first observed tensor sets the step; from then on observing changes nothing and the optimizer moves it.
    `init="mse"`: the step of least squared error on that tensor, searched from the best one for a Gaussian, or
    "paper": `2 E|x| / sqrt(Qp)`, 19 times the error at 8 bits. `signed` codes or not, None: the first tensor decides,
    by whether it goes below 0. The step's gradient is scaled by `1 / sqrt(N Qp)`, N the elements that share a step, or
    those of one sample if `per_sample` (activations). A step is never used below a thousandth of its first value, so
    it stays positive. `torchquant.quantizer_parameters(model)` is an optimizer group without weight decay; build the
    optimizer after calibration where steps per group, or per channel of an activation, get their number only
    then. Raises ConfigError.

    >>> quantizer = LSQQuantizer(4)
    >>> quantizer.pre_observe(torch.randn(1000))
    >>> quantizer(torch.randn(8)).sum().backward()
    >>> quantizer.step.grad.shape
    torch.Size([1])
    """

    learned = ("step",)
    statistics = ("initial_step", "lowest")
    joined_by = {"initial_step": "rms", "lowest": "min"}
    typical_acts = "lsq:{n}"
    about = About("step * RHE(clamp(x / step)), step learned", "Esser et al. 2020, LSQ, arXiv:1902.08153", "1..12")
    initial_step: Tensor
    step: Tensor

    def __init__(
        self,
        n_bits: int,
        signed: bool | None = True,
        init: str = "mse",
        per_sample: bool = False,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        only_signed = n_bits == max(FULL_STEP)
        lsq_codes(n_bits, only_signed if signed is None else signed)
        check_init(init)
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits
        self.signed = True if signed is None and only_signed else signed
        self.init = init
        self.per_sample = per_sample

    def _decide_sign(self) -> None:
        super()._decide_sign()
        if self.signed is None and self.n_bits == 1 and self._goes_below_zero and self.is_observed:
            lowest = float(self.lowest.min())
            self.reset()
            raise ConfigError(
                f"one bit has no signed codes here, and the first tensor goes down to {lowest:.4g}; take 2 bits, a "
                "1-bit scheme such as xnor, or signed=False to clip what is below 0"
            )

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        lowest = lowest_of(x)
        if self.init == "mse":
            steps = FULL_STEP.get(self.n_bits, 1.0), 2**0.5 * NARROW_STEP.get(self.n_bits + 1, 1.0)
            factor = where_signed(self.signed, lowest, *steps)
            rms = reduce_mean(row_mean_squares(x)).sqrt()
            step = torch.where(rms > 0, self._least_error(x, or_one(rms * factor), lowest), rms)
        else:
            largest_code = where_signed(self.signed, lowest, 2 ** (self.n_bits - 1) - 1, 2**self.n_bits - 1)
            step = 2.0 * row_mean_magnitudes(x, ranks()) / largest_code**0.5
        return first((or_one(usable_scale(step, 2.0**self.n_bits)), lowest), self.axis)

    def _least_error(self, x: Tensor, guess: Tensor, lowest: Tensor) -> Tensor:
        units, unit = unit_rows(x, ranks())
        fitted = [
            refitted_step(units, (guess / unit).clamp_min(2.0**-100), *integer_codes(self.n_bits, sign), parts=ranks())
            for sign in ((True, False) if self.signed is None else (self.signed,))
        ]
        return torch.where((lowest < 0).any(), fitted[0], fitted[-1]) * unit

    def grid(self) -> tuple[Tensor | int, ...]:
        """Return the step in use."""
        return (self.bounded("step"),)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (step,) = self.grid_for(x)
        qmin, qmax = self.code_range
        scale = gradient_scale(x, self.initial_step.numel(), self.per_sample, qmax)
        return lsq_quantize(x, step, self.n_bits, qmin < 0, scale, delta=self._buffers.get("delta"))

    @classmethod
    def examples(cls, axis: int | None = None) -> list[LSQQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, axis=axis), cls(8, axis=axis, init="paper"), cls(2, axis=axis)]

    def extra_repr(self) -> str:
        sign = {True: "signed", False: "unsigned", None: "sign by the first tensor"}[self.signed]
        return f"n_bits={self.n_bits}, {sign}, init={self.init!r}, {super().extra_repr()}"


@QUANTIZERS.register("ewgs")
class EWGSQuantizer(LSQQuantizer):
    """A learned step, and a gradient scaled by the rounding error of each element (Lee et al. 2021, arXiv:2104.00903).

    The gradient of x is `g (1 + delta sign(g) (x_n - x_q))`; `delta` is a buffer that `set_delta`, or
    `torchquant.training.adapt_ewgs`, changes during training. Deviation: one step is learned, with LSQ's gradient,
    where the paper learns the two ends of the interval. For any other format: `@ewgs`. Raises ConfigError.

    >>> quantizer = EWGSQuantizer(2, delta=1e-3)
    >>> quantizer.pre_observe(torch.randn(1000))
    >>> quantizer.set_delta(0.2)
    """

    typical_acts = "ewgs:{n}"
    about = About(
        "step * RHE(clamp(x / step)), step learned, gradient g (1 + delta sign(g) (x_n - x_q))",
        "Lee et al. 2021, EWGS, arXiv:2104.00903",
        "1..12",
    )
    delta: Tensor

    def __init__(
        self,
        n_bits: int,
        signed: bool | None = True,
        delta: float = 1e-3,
        init: str = "mse",
        per_sample: bool = False,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(n_bits, signed, init, per_sample, axis, nonfinite)
        self.register_buffer("delta", torch.zeros(()))
        self.set_delta(delta)

    def set_delta(self, delta: float | Tensor) -> None:
        """Set delta, >= 0; 0 is LSQ. Raises ConfigError."""
        if not float(delta) >= 0.0:
            raise ConfigError(f"delta must be a number >= 0, got {float(delta)!r}")
        self.delta.fill_(float(delta))

    @classmethod
    def examples(cls, axis: int | None = None) -> list[LSQQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, delta=0.1, axis=axis), cls(2, delta=0.0, axis=axis)]


@QUANTIZERS.register("lsqplus")
class LSQPlusQuantizer(LearnedQuantizer):
    """LSQ with a better start, and for activations a trained offset too (Bhalgat et al. 2020, arXiv:2004.09576).

    Without `offset` (weights): signed codes, `init="paper"` the step `max(|mean - 3 std|, |mean + 3 std|) / 2**(n-1)`,
    "mse" that of least error on a Gaussian. With `offset`: `x^ = step * RHE(clamp((x - offset) / step)) + offset` with
    codes 0 .. 2**n - 1, both started where the squared error of the first tensor is least. Real 0 is then between two
    levels until `snap()` moves the offset to a whole number of steps; only then is there an affine view.
    Gradient of the offset: 0 inside the codes, 1 outside; docs/algorithms.md B6. Raises ConfigError.

    >>> quantizer = LSQPlusQuantizer(4, offset=True)
    >>> quantizer.pre_observe(torch.linspace(-0.3, 4.0, 500))
    >>> quantizer.snap()
    >>> quantizer.affine_params().zero_point
    tensor(1., dtype=torch.float64)
    """

    joined_by = {"initial_step": "max", "initial_offset": "min"}
    is_uniform = True
    typical_acts = "lsqplus:{n}"
    about = About(
        "step * RHE(clamp((x - offset) / step)) + offset, both learned",
        "Bhalgat et al. 2020, arXiv:2004.09576",
        "2..11",
    )
    initial_step: Tensor
    initial_offset: Tensor
    step: Tensor
    offset: Tensor

    def __init__(
        self,
        n_bits: int,
        offset: bool = False,
        init: str = "mse",
        per_sample: bool = False,
        axis: int | None = None,
        nonfinite: str = "raise",
    ) -> None:
        lsq_codes(n_bits, not offset)
        check_init(init)
        self.learned = ("step", "offset") if offset else ("step",)
        self.statistics = tuple(f"initial_{name}" for name in self.learned)
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits
        self.has_offset = offset
        self.init = init
        self.per_sample = per_sample

    @property
    def code_range(self) -> tuple[int, int]:
        return lsq_codes(self.n_bits, not self.has_offset)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        if self.has_offset:
            return first(self._least_error(x), self.axis)
        if self.init == "mse":
            step = reduce_mean(row_mean_squares(x)).sqrt() * FULL_STEP[self.n_bits]
        else:
            mean, deviation = row_moments(x, ranks())
            step = (mean.abs() + 3 * deviation) / 2 ** (self.n_bits - 1)
        return first((or_one(usable_scale(step, 2.0**self.n_bits)),), self.axis)

    def _least_error(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = reduce_max(torch.stack([-x.amin(1), x.amax(1)]).to(torch.float64))
        limit = torch.finfo(torch.float32).max / 4
        finite = low.isfinite() & high.isfinite()
        low, high = (-low).clamp(-limit, limit), high.clamp(-limit, limit)
        n_steps = 2**self.n_bits - 1

        def quantize(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
            step = ((high - low) / n_steps).clamp_min(2.0**-126)
            return ((values - low) / step).round().clamp(0, n_steps) * step + low

        wide = x.to(torch.float64)
        # Shrink towards real 0 or the end next to it, which suits the output of a ReLU, or towards the mean.
        mean = reduce_mean(row_sums(wide) / wide.shape[1])
        found = []
        for middle in (torch.zeros_like(low).clamp(low, high), mean.nan_to_num(0.0).clamp(low, high)):
            spans = low - middle, high - middle
            ends = torch.stack(best_range(wide - middle[:, None], None, *spans, quantize, steps=50, parts=ranks()))
            ends = ends + middle
            error = reduce_mean((quantize(wide, *ends[:, :, None]) - wide).square().mean(1))
            found.append((error, ends))
        (error, ends), (other_error, other_ends) = found
        low, high = torch.where(error <= other_error, ends, other_ends)
        step = usable_scale((high - low) / n_steps, 2.0**self.n_bits)
        nan = torch.full_like(step, torch.nan)
        return torch.where(finite, or_one(step), nan), torch.where(finite, low, nan)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the step in use, and the offset."""
        step = self.bounded("step")
        return step, self.number("offset") if self.has_offset else torch.zeros_like(step)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        step, offset = self.grid_for(x)
        scale = gradient_scale(x, self.initial_step.numel(), self.per_sample, self.code_range[1])
        if not self.has_offset:
            return lsq_quantize(x, step, self.n_bits, True, scale)
        return lsq_quantize(x, step, self.n_bits, False, scale, scaled_gradient(offset, scale))

    def format(self) -> Format:
        step, offset = self.grid()
        return UniformGrid(step, 0, *self.code_range, offset=offset if self.has_offset else None, axis=self.axis)

    @torch.no_grad()
    def snap(self) -> None:
        """Move the offset to the nearest whole number of steps, so that real 0 is a level where it is in range."""
        if self.has_offset:
            step = self.bounded("step")
            offset = self.number("offset")
            offset.copy_((offset / step).round() * step)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[LSQPlusQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, True, axis=axis), cls(4, axis=axis), cls(8, init="paper", axis=axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, offset={self.has_offset}, init={self.init!r}, {super().extra_repr()}"
