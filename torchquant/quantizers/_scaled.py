"""Schemes whose format is fixed numbers times a scale, which comes from the scheme's own rule or from an observer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import FittedQuantizer
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional._row_statistics import usable_scale
from torchquant.quantizers_functional.formats import Format, ScaledFormat, UniformGrid
from torchquant.range_observers import MSEObserver, RangeObserver


class ScaledQuantizer(FittedQuantizer):
    """A fitted quantizer with one scale, which `measure` fits to the data or the range of an observer determines.

    With `set_observer(observer)`, `observer=NAME` in a spec string, the largest level of the format is put on the end
    of the observed range that is farther from 0; with a shift the levels are centred on the range and reach to both
    its ends. `observer=mse` then searches the range of least error of this very format. The statistics that the
    quantizer itself would measure are not used.
    """

    fuses_clamp = True
    own_rule: ClassVar[tuple[str, str] | None] = None
    """Name of the constructor's argument for the rule of the scheme itself, and its default."""
    has_shift = False
    """Whether the levels are shifted to the data."""

    scale_of_zeros: ClassVar[float] = 0.0
    """The scale of a tensor of zeros; 0 if no level is 0, so that zeros stay zeros."""

    @abstractmethod
    def format_with(self, *numbers: Tensor) -> ScaledFormat | UniformGrid:
        """Return the format with these numbers, in the order of `grid()`."""

    def numbers_at(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        """Return the numbers of `grid()` for a scale, and for a shift if the scheme has one."""
        return (scale,)

    def format(self) -> Format:
        return self.format_with(*self.grid())  # type: ignore[arg-type]

    @property
    def _range_observer(self) -> RangeObserver | None:
        found = self._modules.get("observer")
        assert found is None or isinstance(found, RangeObserver)
        return found

    def set_observer(self, observer: RangeObserver) -> None:
        """Derive the scale from the range of an observer, from its first batch on. Raises ConfigError."""
        if observer.axis != self.axis:
            raise ConfigError(f"the observer works along axis {observer.axis}, the quantizer along {self.axis}")
        if self.own_rule is not None:
            name, default = self.own_rule
            if getattr(self, name) != default:
                given = f"{name}={getattr(self, name)}"
                raise ConfigError(f"{given} says where the scale comes from, and an observer does; give one of the two")
        if getattr(observer, "symmetric", False) is not False:
            raise ConfigError(f"symmetric={observer.symmetric} is for affine grids; {type(self).__name__} has its own")
        if isinstance(observer, MSEObserver):
            observer.format_over = self.format_over
            observer.shrinks_alike = not self.has_shift
        self.observer = observer

    def numbers_over(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """Return the numbers for which the levels cover [low, high]; see the class. low, high: any shape."""
        middle = (low + high) / 2 if self.has_shift else torch.zeros_like(low)
        reach = torch.maximum(middle - low, high - middle)
        largest = self.format_with(*self.numbers_at(reach, middle)).largest
        scale = usable_scale(reach / largest, largest)
        return self.numbers_at(torch.where(scale > 0, scale, self.scale_of_zeros), middle)

    def format_over(self, low: Tensor, high: Tensor) -> Format:
        """Return the format whose levels cover [low, high], with numbers in the shape of the ends."""
        return replace(self.format_with(*self.numbers_over(low, high)), axis=None)

    def get(self) -> tuple[Tensor, ...]:
        observer = self._range_observer
        return super().get() if observer is None else self.numbers_over(*observer.get_ranges())

    def grid(self) -> tuple[Tensor | int, ...]:
        return self.get()

    def numbers(self) -> dict[str, Tensor]:
        """Return the statistics, or the ends of the observer's range."""
        observer = self._range_observer
        if observer is None:
            return super().numbers()
        return dict(zip(("range_min", "range_max"), observer.get_ranges(), strict=True))

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        observer = self._range_observer
        if observer is None:
            super()._set_numbers(**numbers)
        else:
            observer.force_ranges(**numbers)

    @property
    def is_ready(self) -> bool:
        observer = self._range_observer
        return super().is_ready if observer is None else observer.is_observed

    @property
    def is_memoryless(self) -> bool:
        observer = self._range_observer
        return super().is_memoryless if observer is None else observer.is_memoryless

    def allocate(self, n_channels: int) -> None:
        super().allocate(n_channels)
        observer = self._range_observer
        if observer is not None:
            observer.allocate(n_channels)

    def reset(self) -> None:
        super().reset()
        observer = self._range_observer
        if observer is not None:
            observer.reset()

    def force(self, *values: Tensor | float) -> None:
        if self._range_observer is not None:
            raise ConfigError("an observer gives the scale of this quantizer; call observer.force_ranges(min, max)")
        super().force(*values)

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        """Fit the numbers to x, or to `x.clamp(*clamp)`."""
        observer = self._range_observer
        if observer is None:
            super().pre_observe(x, clamp)
        elif clamp is None:
            observer.observe_batch(x)
        else:
            observer.observe_clamped(x, clamp)

    def extra_repr(self) -> str:
        return super().extra_repr() if self._range_observer is None else f"axis={self.axis}, scale by its observer"
