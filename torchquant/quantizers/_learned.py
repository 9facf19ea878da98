"""The base of quantizers with trained numbers: the first tensor initializes parameters, an optimizer updates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError
from torchquant.quantizers._base import FittedQuantizer
from torchquant.quantizers_functional.formats import Format, UniformGrid
from torchquant.quantizers_functional.uniform import integer_codes
from torchquant.range_observers._distributed import reduce_max
from torchquant.range_observers._statistics import ordinary_zeros

INITS = ("mse", "paper")


def check_init(init: str) -> None:
    """Raise ConfigError for an unknown initialization."""
    if init not in INITS:
        raise ConfigError(f"init must be one of {', '.join(INITS)}, got {init!r}")


class LearnedQuantizer(FittedQuantizer):
    """A quantizer some of whose numbers are `nn.Parameter`s, (1,) or (C,): FSDP2 refuses parameters of no dimension.

    `learned` names them; each has a statistic `initial_NAME` that `measure` returns. The first observed tensor
    initializes the parameter to it, and from then on only the optimizer moves it. Other statistics are still
    measured. Parameters stay in float32 under `.half()`, as statistics do.
    """

    learned: tuple[str, ...]
    lowest: Tensor
    """Statistic of schemes that allow `signed=None`: a first tensor with values below 0 makes the codes signed."""
    present: Tensor
    """Statistic of schemes without a level at 0, see `ever_present`."""
    _goes_below_zero = True

    def __init__(self, axis: int | None = None, nonfinite: str = "raise", momentum: float = 0.0) -> None:
        super().__init__(momentum, axis, False, nonfinite)
        self.set_once = frozenset([*(f"initial_{name}" for name in self.learned), "lowest"])
        for name in self.learned:
            initial = getattr(self, f"initial_{name}")
            setattr(self, name, nn.Parameter(initial.new_ones(initial.shape or (1,))))

    @property
    def is_signed(self) -> bool:
        """Whether codes go below 0. Raises UnobservedRangeError if the first tensor decides and has not been seen."""
        if self.signed is None:
            self.get()
            return self._goes_below_zero
        return self.signed

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """Return no names: the scheme defines its own gradient."""
        return ()

    def _observe(self, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        is_first = not (self.is_observed and self.is_start_complete)
        super()._observe(x, measure)
        if is_first:
            self._start()

    def force(self, *values: Tensor | float) -> None:
        """Set the numbers by hand, () or (C,) each, in the order of `statistics`; learned ones start there."""
        super().force(*values)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        if self.is_observed:
            for name in self.learned:
                self.number(name).copy_(getattr(self, f"initial_{name}"))
            self._decide_sign()

    def _decide_sign(self) -> None:
        if self.is_observed and self.signed is None:
            self._goes_below_zero = bool((self.lowest < 0).any())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.learned:
            given = state_dict.get(prefix + name)
            if given is not None and given.ndim == 0:  # a checkpoint of 0.1
                state_dict[prefix + name] = given.view(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_note(self) -> None:
        super()._take_note()
        if self._is_observed:
            self._decide_sign()

    def _resize(self, groups: tuple[int, ...] | torch.Size) -> None:
        super()._resize(groups)
        for name in self.learned:
            parameter = getattr(self, name)
            shape = self._shape_of(f"initial_{name}", groups) or (1,)
            if parameter.shape != torch.Size(shape):
                setattr(self, name, nn.Parameter(ordinary_zeros(shape, parameter).fill_(1.0)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedQuantizer:
        before = {name: getattr(self, name).data for name in self.learned}
        super()._apply(fn, recurse)
        for name, old in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = old.to(device=parameter.device, dtype=torch.float32)
        return self

    def number(self, name: str) -> Tensor:
        """Return a parameter in the shape of its initial statistic: () if it is one number."""
        parameter: Tensor = getattr(self, name)
        return parameter.view_as(getattr(self, f"initial_{name}"))

    def numbers(self) -> dict[str, Tensor]:
        """Return the parameters, and the statistics that initialize no parameter."""
        found = dict(zip(self.statistics, self.get(), strict=True))
        others = {name: value for name, value in found.items() if name.removeprefix("initial_") not in self.learned}
        return {name: self.number(name).detach() for name in self.learned} | others

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        for name, value in numbers.items():
            held = self.number(name) if name in self.learned else getattr(self, name)
            held.copy_(torch.as_tensor(value))
        self._decide_sign()

    def ever_present(self, absmax: Tensor) -> Tensor:
        """Return 1 for each row that holds a number other than 0, or held one before; the statistic `present`.

        Schemes without a level at 0 multiply their levels by it, so that zeros stay zeros and nothing else does.
        absmax: (C,), the largest magnitudes of the rows over all ranks. (C,) float64.
        """
        now = (absmax > 0).to(torch.float64)
        return torch.maximum(now, self.present) if self.is_observed else now

    def statistic(self, name: str) -> Tensor:
        """Return a copy of a statistic: backward needs it as it is now, and the next tensor may change it before."""
        self.get()
        value: Tensor = getattr(self, name)
        return value.clone()

    def bounded(self, name: str) -> Tensor:
        """Return a positive parameter as it is used: never below a thousandth of its first value.

        The gradient passes through the bound, so that a parameter pushed below it can come back.
        """
        self.get()
        parameter, initial = self.number(name), getattr(self, f"initial_{name}")
        floor = (initial * 1e-3).clamp_min(2.0**-126)
        return parameter + (torch.maximum(parameter, floor) - parameter).detach()


class LearnedUniform(LearnedQuantizer):
    """A uniform grid through 0 whose step is trained: `grid()` is `(step,)`, codes are n-bit integers."""

    is_uniform = True

    @property
    def code_range(self) -> tuple[int, int]:
        return integer_codes(self.n_bits, self.is_signed)

    def format(self) -> Format:
        (step,) = self.grid()
        return UniformGrid(step, 0, *self.code_range, axis=self.axis)


def gradient_scale(x: Tensor, n_groups: int, per_sample: bool, largest_code: int) -> float:
    """Return LSQ's `1 / sqrt(N Qp)`: N the elements that share a parameter, of one sample if `per_sample`."""
    sharing = x.numel() / max(len(x) if per_sample and x.ndim else n_groups, 1)
    return float((max(sharing, 1.0) * largest_code) ** -0.5)


def scaled_gradient(parameter: Tensor, scale: float) -> Tensor:
    """Return the parameter, with its gradient multiplied by `scale`."""
    return parameter.detach() + (parameter - parameter.detach()) * scale


def lowest_of(x: Tensor) -> Tensor:
    """Return the smallest value of each row, over all ranks. x: (C, n). (C,)."""
    return -reduce_max(-x.amin(1))


def largest_of(x: Tensor) -> Tensor:
    """Return the largest magnitude of each row, over all ranks. x: (C, n). (C,)."""
    return reduce_max(torch.maximum(x.amax(1), -x.amin(1)))


def where_signed(signed: bool | None, lowest: Tensor, if_signed: float, if_not: float) -> Tensor:
    """Choose one of two numbers, float64 (), by `signed` or, if it is None, by the lowest values."""
    if signed is None:
        return torch.where((lowest < 0).any(), if_signed, if_not).to(torch.float64)
    return torch.full((), if_signed if signed else if_not, device=lowest.device).to(torch.float64)


def or_one(scale: Tensor) -> Tensor:
    """Return `scale`, with 1 where it is 0, the scale of a tensor of zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def first(values: tuple[Tensor, ...], axis: int | None) -> tuple[Tensor, ...]:
    """Return (C,) statistics in the shape that a tracker expects: () each without an axis."""
    return values if axis is not None else tuple(value.squeeze(0) for value in values)
