"""The calibrated state of a quantizer: observing, the resulting numbers, and the pin that keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError, UnobservedRangeError
from torchquant.range_observers._pins import Pinnable
from torchquant.range_observers._statistics import StatisticTracker


class CalibratedState(Pinnable):
    """The part of a quantizer that depends on data: its methods do nothing for a scheme that observes nothing."""

    def pre_observe(self, x: Tensor) -> None:  # noqa: B027 - an observer is optional
        """Observe the real tensor before it is quantized."""

    def post_observe(self, x: Tensor) -> None:  # noqa: B027 - an observer is optional
        """Observe the quantized tensor."""

    @property
    def is_ready(self) -> bool:
        """Whether `quantize` can be called: False for a quantizer that has yet to observe data."""
        return True

    @property
    def is_memoryless(self) -> bool:
        """Whether `pre_observe` of the same tensor twice in a row is the same as once.

        If so, calibration observes an unchanged weight once, not with every batch.
        """
        return False

    def allocate(self, n_channels: int) -> None:  # noqa: B027 - most schemes have nothing to size
        """Size per-channel state for `n_channels` before the first batch."""

    def allocate_for(self, weight: Tensor) -> None:
        """Size the state for a weight, output channel on axis 0, before it is observed.

        Raises ConfigError for a weight that has no such channels, groups or blocks.
        """
        axis = getattr(self, "axis", None) or 0
        if not -weight.ndim <= axis < weight.ndim:
            raise ConfigError(
                f"a weight of shape {tuple(weight.shape)} has no axis {axis}, along which {type(self).__name__} has "
                "its numbers; /in_channel takes weights with an axis of input channels, /channel any"
            )
        self.allocate(weight.shape[axis])

    def numbers(self) -> dict[str, Tensor]:
        """Return the numbers that determine the grid, () or (C,), by name; {} if there are none to set."""
        return {}

    @torch.no_grad()
    def set_numbers(self, **numbers: Tensor | float) -> None:
        """Set all numbers that `numbers()` returns. Raises ConfigError for other names."""
        known = self.numbers()
        if numbers.keys() != known.keys():
            names = ", ".join(known) or "none to set"
            raise ConfigError(f"the numbers of {type(self).__name__} are: {names}; got {', '.join(numbers) or 'none'}")
        self._set_numbers(**numbers)

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        """Set the numbers, whose names have been checked."""

    pinned: Tensor
    """The shape of the pinned weight, float32; the buffer exists only while a weight is pinned."""

    @torch.no_grad()
    def pin(self, weight: Tensor, observe: bool = True) -> None:
        """Keep the numbers that follow from this weight until `unpin()`; does nothing if a weight is pinned already.

        Neither observing, in any state, nor training changes pinned numbers: learned parameters of the quantizer take
        no gradient. The pin is saved with the `state_dict`. `set_numbers` still sets the numbers. For formats whose
        blocks compute their scale from their own elements, these scales are kept. `observe=False` keeps the current
        numbers of the quantizer, whichever weight they come from.

        weight: as `quantize` gets it. Raises UnobservedRangeError if there are no numbers to keep, ConfigError for
        schemes whose numbers do not follow from a weight.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(3, 0)
        >>> quantizer.pin(torch.tensor([1.0, -1.0]))
        >>> quantizer.pre_observe(torch.tensor([90.0]))
        >>> quantizer(torch.tensor([90.0]))
        tensor([2.0725])
        """
        if self.is_pinned:
            return
        if observe:
            self.pre_observe(weight)
        if not self.is_ready:
            raise UnobservedRangeError(
                f"{type(self).__name__} has no numbers to pin: it has seen no data, or a weight without elements"
            )
        kept = {"pinned": torch.tensor(weight.shape, dtype=torch.float32, device=weight.device)}
        own = self._numbers_of(weight)
        for part in self.modules():
            if isinstance(part, StatisticTracker):
                part.settle()
            if isinstance(part, Pinnable):
                part._hold(kept | own if part is self else kept)

    def unpin(self) -> None:
        """Let observing, and training, change the numbers again."""
        for part in self.modules():
            if isinstance(part, Pinnable):
                part._release()

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what a pin keeps for this weight in addition to the quantizer's numbers, by the names in `kept`.

        Raises ConfigError if the numbers do not follow from a weight.
        """
        return {}
