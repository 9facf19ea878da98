"""The contract of range observers."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._registry import Registry
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.range_observers._statistics import StatisticTracker

OBSERVERS: Registry[type[RangeObserver]] = Registry("range observer")


class RangeObserver(StatisticTracker):
    """Tracks [range_min, range_max] of a tensor, per tensor or per channel.

    A new observer is one method: `measure(x) -> (min, max)`, () or (C,) each; averaging, buffers,
    checkpoints and the refusal of NaN come from `StatisticTracker`. The published contract is
    `observe_batch`, `get_ranges`, `force_ranges`, `reset`.
    """

    statistics: tuple[str, ...] = ("range_min", "range_max")
    joined_by = {"range_min": "min", "range_max": "max"}
    made_by = "BatchMinMax() is one"
    """Advice in messages when another object is given in place of an observer."""
    range_min: Tensor
    range_max: Tensor

    def observe_clamped(self, x: Tensor, clamp: Clamp) -> None:
        """Observe `x.clamp(*clamp)`. An observer that can do so without the extra pass overrides it."""
        self.observe_batch(x.clamp(*clamp))

    def get_ranges(self) -> tuple[Tensor, Tensor]:
        """Return (range_min, range_max), () or (C,) each. Raises UnobservedRangeError before any data."""
        range_min, range_max, *_ = self.get()
        return range_min, range_max

    def force_ranges(self, range_min: Tensor | float, range_max: Tensor | float) -> None:
        """Set the range by hand; later batches are averaged into it. Raises ConfigError if min > max."""
        if bool((torch.as_tensor(range_min) > torch.as_tensor(range_max)).any()):
            raise ConfigError(f"range_min must not exceed range_max, got {range_min} and {range_max}")
        self.force(range_min, range_max)
