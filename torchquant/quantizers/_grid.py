"""The base classes of most schemes: formats given by a few numbers, from an observer or fitted to the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Set
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from torchquant._tensors import per_channel_view
from torchquant.errors import ConfigError, NoCodesError, NonFiniteError
from torchquant.quantizers._contract import Quantizer
from torchquant.quantizers_functional._formula import Altered, Formula
from torchquant.quantizers_functional._gradient import (
    GRADIENTS,
    Clamp,
    Gradient,
    cast_back,
    compute_dtype,
    make_gradient,
)
from torchquant.quantizers_functional.formats import AffineParams, Format, UniformGrid
from torchquant.range_observers import RangeObserver
from torchquant.range_observers._statistics import StatisticTracker


class GridQuantizer(Quantizer):
    """A quantizer whose format is given by a few numbers, fixed while it quantizes.

    A subclass gives the numbers (`grid`) and defines what they mean, in one of two ways: `format()`, an instance of a
    class in `quantizers_functional`; or `codes`, `values` and `code_range`, on tensors already shaped to broadcast
    against x. This class handles gradient, clamp, half types, channels, NaN and the level list.
    """

    fuses_clamp = True
    traits: ClassVar[frozenset[str]] = frozenset()
    """Properties of the format that gradient estimators may require; see `Gradient.needs`."""

    def __init__(self, gradient_clip: bool = False) -> None:
        super().__init__()
        self.gradient = make_gradient("clipped" if gradient_clip else "ste")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {"codes", "values", "project"} & cls.__dict__.keys()
        if not own or "format" in cls.__dict__ or cls.format is GridQuantizer.format:
            return
        is_whole = {"codes", "values"} <= own
        cls.format = GridQuantizer.format if is_whole else _altered(cls.format, own)  # type: ignore[method-assign, assignment]

    @abstractmethod
    def grid(self) -> tuple[Tensor | int, ...]:
        """Return the numbers of the grid: tensors () or (C,), or plain integers."""

    def format(self) -> Format:
        is_own = type(self).project is not GridQuantizer.project
        project = self.project if is_own else None
        affine = self._own_affine()
        return Formula(self.codes, self.values, self.code_range, self.grid(), project, affine, axis=self.axis)

    def codes(self, x: Tensor, *numbers: Any) -> Tensor:
        """Return the integer codes of the nearest grid values, in any type; NaN may stay NaN."""
        raise NoCodesError(f"{type(self).__name__} has neither codes and values nor a format(); write one of the two")

    def values(self, codes: Tensor, dtype: torch.dtype, *numbers: Any) -> Tensor:
        """Return the grid values of codes, in `dtype` (float32 or float64)."""
        raise NoCodesError(f"{type(self).__name__} has neither codes and values nor a format(); write one of the two")

    def project(self, x: Tensor, want_inside: bool, *numbers: Any) -> tuple[Tensor, Tensor | None]:
        """Return the nearest grid value, and 1 where x was not clipped (None unless asked for), in x's type.

        By default, values between the lowest and the highest level are not clipped. Override this method
        for a faster way than through codes, or for another rule of clipping.
        """
        return Formula(self.codes, self.values, self.code_range, numbers).nearest(x, want_inside)

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """Return the names of the gradient estimators that are defined for the format."""
        return tuple(name for name in GRADIENTS if GRADIENTS[name].needs <= cls.traits)

    def set_gradient(self, gradient: str | Gradient, **options: Any) -> None:
        """Set another estimator, with its options. Raises ConfigError, which lists the allowed ones."""
        made = make_gradient(gradient, **options)
        if not self.gradients():
            raise ConfigError(f"{type(self).__name__} has its own gradient, there is none to choose; got {made.name!r}")
        if not made.needs <= self.traits:
            allowed = ", ".join(self.gradients())
            raise ConfigError(f"{type(self).__name__} takes the gradients {allowed}, got {made.name!r}")
        self.gradient = made

    def grid_for(self, x: Tensor) -> tuple[Any, ...]:
        """Return the numbers of the grid in shapes that broadcast against x."""
        return tuple(per_channel_view(n, x.ndim, self.axis) for n in self.grid())

    def quantize(self, x: Tensor, clamp: Clamp | None = None) -> Tensor:
        """Map real values to values on the grid; `clamp=(low, high)` quantizes `x.clamp(low, high)` in one pass."""
        return self.format().quantize(x, self.gradient, clamp, self.training)

    def column_rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        is_own = type(self).quantize is not GridQuantizer.quantize or type(self).nearest is not GridQuantizer.nearest
        if is_own or self.levels_vary or (self.columns_differ and not (self.is_pinned and self.axis == 1)):
            return super().column_rounder()
        form = self.format()
        if not self.columns_differ:
            return lambda x, columns: cast_back(form.project(x.to(compute_dtype(x)))[0], x.dtype)
        inside = prod(int(size) for size in self.pinned.tolist()[2:])

        def rounded(x: Tensor, columns: Tensor) -> Tensor:
            own = form.of_channels(columns // inside)
            return cast_back(own.project(x.to(compute_dtype(x)))[0], x.dtype)

        return rounded

    @torch.no_grad()
    def side_bytes(self, x: Tensor) -> int:
        """Return 4 bytes per number that decoding needs; a zero point other than 0 takes the bytes of a code."""
        return self.format().side_bytes()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Map real values to integer codes (int32). Raises NonFiniteError for NaN; Inf saturates."""
        if bool(torch.isnan(x).any()):
            raise NonFiniteError(f"{type(self).__name__} cannot encode NaN; x has {int(torch.isnan(x).sum())} of them")
        return self.format().encode(x)

    @torch.no_grad()
    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map codes to real values of type `dtype`. Raises ConfigError for a code outside of `code_range`."""
        if codes.numel():
            (low, high), (least, most) = self.code_range, (int(end) for end in torch.aminmax(codes))
            if least < low or most > high:
                raise ConfigError(f"codes of {type(self).__name__} are {low}..{high}, got {least}..{most}")
        return self.format().decode(codes, dtype)

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        return self.format().preimage(values)


def _altered(inherited: Callable[[Any], Format], own: Set[str]) -> Callable[[Any], Format]:
    """Make the `format()` of a scheme that overrides functions which the inherited `format()` does not call."""

    def format(self: Any) -> Format:
        base = inherited(self)
        functions = (getattr(self, name) if name in own else None for name in ("codes", "values", "project"))
        return Altered(base, self.grid(), *functions, axis=base.axis)

    return format


class OwnScaleQuantizer(GridQuantizer):
    """A quantizer whose parts (blocks, tokens) each compute their scale from their own elements at every call."""

    fuses_clamp = False

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """Return straight-through only: a scale that covers its part clips nothing."""
        return ("ste",)

    @property
    def is_memoryless(self) -> bool:
        return True

    @property
    def code_range(self) -> tuple[int, int]:
        return self.format().code_range

    def grid(self) -> tuple[Tensor | int, ...]:
        """Return (): the elements determine everything."""
        return ()


class UniformQuantizer(GridQuantizer):
    """A uniform grid over the range of an observer. A subclass computes `affine_params` from the range."""

    fuses_clamp = True
    is_uniform = True
    traits = frozenset({"step"})

    def __init__(self, n_bits: int, range_observer: RangeObserver, gradient_clip: bool = False) -> None:
        super().__init__(gradient_clip)
        if not isinstance(range_observer, RangeObserver):
            raise TypeError(f"range_observer must be a RangeObserver such as BatchMinMax(), got {range_observer!r}")
        self.n_bits = n_bits
        self.observer = range_observer  # type: ignore[misc] # a module takes it as a child

    @property
    def observer(self) -> RangeObserver:
        """The observer that determines the range."""
        return cast(RangeObserver, self._modules["observer"])  # __getattr__ of a module takes ten times as long

    @property
    def axis(self) -> int | None:  # type: ignore[override]
        """The observer's axis, each slice of which has its own grid."""
        return self.observer.axis

    @property
    def is_ready(self) -> bool:
        return self.observer.is_observed

    @property
    def is_memoryless(self) -> bool:
        return self.observer.is_memoryless

    def allocate(self, n_channels: int) -> None:
        self.observer.allocate(n_channels)

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        """Update the range with x, or with `x.clamp(*clamp)`."""
        if clamp is None:
            self.observer.observe_batch(x)
        else:
            self.observer.observe_clamped(x, clamp)

    @abstractmethod
    def affine_params(self) -> AffineParams:
        """Return the grid over the observed range."""

    @property
    def code_range(self) -> tuple[int, int]:
        params = self.affine_params()
        return params.qmin, params.qmax

    def numbers(self) -> dict[str, Tensor]:
        """Return the ends of the range."""
        return dict(zip(("range_min", "range_max"), self.observer.get_ranges(), strict=True))

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        self.observer.force_ranges(**numbers)

    def grid(self) -> tuple[Tensor | int, ...]:
        return self.affine_params()

    def format(self) -> Format:
        return UniformGrid(*self.affine_params(), axis=self.axis)


class FittedQuantizer(StatisticTracker, GridQuantizer):
    """A quantizer whose numbers are fitted to the data itself: thresholds, scales, levels.

    The numbers are the statistics of a `StatisticTracker`: named in `statistics`, computed by
    `measure(x)`, averaged over batches with `momentum`, saved and loaded like any observer's.
    """

    fuses_clamp = True

    def __init__(
        self, momentum: float = 0.0, axis: int | None = None, gradient_clip: bool = False, nonfinite: str = "raise"
    ) -> None:
        super().__init__(momentum, axis, nonfinite)
        self.gradient = make_gradient("clipped" if gradient_clip else "ste")

    @property
    def is_ready(self) -> bool:
        return self.is_observed

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        """Fit the numbers to x, or to `x.clamp(*clamp)`."""
        self.observe_batch(x if clamp is None else x.clamp(*clamp))

    def grid(self) -> tuple[Tensor | int, ...]:
        return self.get()

    def numbers(self) -> dict[str, Tensor]:
        """Return the statistics."""
        return dict(zip(self.statistics, self.get(), strict=True))

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        self.force(*(numbers[name] for name in self.statistics))
