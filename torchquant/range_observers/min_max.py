"""Minimum and maximum: of the last batch, of all batches, or averaged exponentially over batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional.affine import AffineRule
from torchquant.range_observers._base import OBSERVERS, RangeObserver
from torchquant.range_observers._distributed import reduce_max, world_size
from torchquant.range_observers._statistics import ends_along

_STEPS = frozenset({"observe_batch", "observe_clamped", "get_ranges"})
"""The methods that observing and quantizing in one call stands for."""


class MinMax(RangeObserver):
    """The base of the observers here: the ends of a batch, and what they become with those before."""

    joins = False
    """Whether the range never shrinks."""

    def observe_batch(self, x: Tensor) -> None:
        if not self._track(x, None):
            super().observe_batch(x)

    def _track(self, x: Tensor, clamp: Clamp | None) -> bool:
        """Observe by one call of a kernel; False where the steps have to run one by one, as for numbers to refuse."""
        x = x.detach()
        kernel = self._kernel("track", x)
        if kernel is None:
            return False
        rest = self.axis, clamp, self.momentum, self.starts_at_first, self.joins
        is_done = bool(kernel(x, *self._held(), *rest))
        if is_done:
            self._note(True)
        return is_done

    def observe_and_project(
        self, x: Tensor, grid: AffineRule, clamp: Clamp | None, is_strict: bool, wants_inside: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Observe x, or `x.clamp(*clamp)`, and put it on the grid over the range, by one call of a kernel.

        Returns the values and the mask of `Format.fused`; None, and changes nothing, where the steps have to run one by
        one. x: (*), without autograd history.
        """
        kernel = self._kernel("observed", x)
        if kernel is None or not self.is_open_as(MinMax, _STEPS):
            return None
        average = self.momentum, self.starts_at_first, self.joins
        found = kernel(x, self._held(), self.axis, average, grid, clamp, is_strict, wants_inside)
        if found is not None:
            self._note(True)
        return cast("tuple[Tensor, Tensor | None] | None", found)

    def _kernel(self, name: str, x: Tensor) -> Callable[..., Any] | None:
        """Return a kernel that changes the range; None where the steps have to run one by one."""
        if self._n_calls > 1 or self.nonfinite != "raise" or type(self).measure not in _OWN or world_size() > 1:
            return None
        kernel = kernels.find(name, x)
        if kernel is None or cast(Tensor, self._buffers["observed_weight"]).is_inference():
            return None
        if self.axis is not None:
            self._expect_channels(x.shape[self.axis :][:1])
        return kernel

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ends of the range, and how much data was seen."""
        buffers: Any = self._buffers
        return buffers["range_min"], buffers["range_max"], buffers["observed_weight"]

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x) if self.axis is None else ends_along(x, self.axis)
        if world_size() == 1:
            return low, high
        both = reduce_max(torch.stack([-low, high]))
        return -both[0], both[1]

    def observe_clamped(self, x: Tensor, clamp: Clamp) -> None:
        """Observe `x.clamp(*clamp)`: clamping is monotone, so it commutes with min and max.

        This does not hold if ranks join their ends: the ends of no elements, or those that mark NaN, are infinite.
        """
        if self._track(x, clamp):
            return
        if world_size() > 1:
            super().observe_clamped(x, clamp)
            return

        def measure(x: Tensor) -> tuple[Tensor, Tensor]:
            low, high = self.measure(x)
            return low.clamp(*clamp), high.clamp(*clamp)

        self._observe(x, measure)


@OBSERVERS.register("minmax")
class BatchMinMax(MinMax):
    """The range of the last batch seen, the published default for weights.

    `axis`: None, or the axis each of whose slices has its own range. Ranks of torch.distributed agree on
    the range of their joined batch. Source: docs/algorithms.md C1.

    >>> observer = BatchMinMax()
    >>> observer.observe_batch(torch.tensor([-1.0, 2.0]))
    >>> observer.get_ranges()
    (tensor(-1.), tensor(2.))
    """

    def __init__(self, axis: int | None = None, nonfinite: str = "raise") -> None:
        super().__init__(0.0, axis, nonfinite)


@OBSERVERS.register("running")
class RunningMinMax(MinMax):
    """The range of all data seen: smallest minimum, largest maximum (docs/algorithms.md C1).

    >>> observer = RunningMinMax()
    >>> for batch in ([-1.0, 2.0], [-3.0, 1.0]):
    ...     observer.observe_batch(torch.tensor(batch))
    >>> observer.get_ranges()
    (tensor(-3.), tensor(2.))
    """

    joins = True

    def __init__(self, axis: int | None = None, nonfinite: str = "raise") -> None:
        super().__init__(0.0, axis, nonfinite)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().measure(x)
        if not self.is_observed:
            return low, high
        least, most = (cast(Tensor, self._buffers[name]) for name in self.statistics)
        if low.dtype != least.dtype:
            least, most = least.to(low.dtype), most.to(high.dtype)
        joined = torch.minimum(low, least), torch.maximum(high, most)
        if low.is_cpu and not torch.compiler.is_compiling():
            return joined
        # Only the device knows whether every batch so far had NaN and was refused.
        is_known = self.observed_weight > 0
        return torch.where(is_known, joined[0], low), torch.where(is_known, joined[1], high)


@OBSERVERS.register("ema")
class ExpAvgMinMax(MinMax):
    """An exponential average of the batches' ranges, with bias correction, for activations.

    `momentum` in (0, 1). `init="first"` starts the average at the first batch instead, without correction (Jacob et
    al. 2018; NNI, with momentum 0.99). Source: docs/algorithms.md C2, the published torchquant rule; `range_min` and
    `range_max` hold the corrected values. Deviation from C2's merge rule: ranks are merged by
    minimum and maximum before the average, so that N ranks equal one rank on the joined batch.

    >>> observer = ExpAvgMinMax(momentum=0.9)
    >>> for batch in ([-1.0, 2.0], [-3.0, 1.0]):
    ...     observer.observe_batch(torch.tensor(batch))
    >>> observer.get_ranges()
    (tensor(-2.0526), tensor(1.4737))
    """

    def __init__(
        self, momentum: float = 0.9, axis: int | None = None, nonfinite: str = "raise", init: str = "corrected"
    ) -> None:
        if init not in ("corrected", "first"):
            raise ConfigError(f"init must be corrected or first, got {init!r}")
        if not 0.0 < momentum < 1.0:
            raise ConfigError(f"momentum must be in (0, 1), got {momentum!r}; BatchMinMax has none")
        super().__init__(momentum, axis, nonfinite)
        self.starts_at_first = init == "first"


_OWN = (MinMax.measure, RunningMinMax.measure)
"""Statistics that the kernel measures too."""
