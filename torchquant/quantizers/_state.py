"""What a quantizer knows of the data it was shown: looking, the numbers that follow, and the pin that keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError, UnobservedRangeError
from torchquant.range_observers._pins import Pinnable
from torchquant.range_observers._statistics import StatisticTracker


class CalibratedState(Pinnable):
    """The part of a quantizer that data change: its methods do nothing for a scheme that looks at nothing."""

    def pre_observe(self, x: Tensor) -> None:  # noqa: B027 - an observer is optional
        """See the real tensor before it is quantized."""

    def post_observe(self, x: Tensor) -> None:  # noqa: B027 - an observer is optional
        """See the quantized tensor."""

    @property
    def is_ready(self) -> bool:
        """Whether `quantize` can be called: False for a quantizer that still has to see data."""
        return True

    @property
    def is_memoryless(self) -> bool:
        """Whether `pre_observe` of the same tensor twice in a row is the same as once.

        If so, a weight that has not changed is shown once in calibration, not with every batch.
        """
        return False

    def allocate(self, n_channels: int) -> None:  # noqa: B027 - most schemes have nothing to size
        """Size per-channel state for `n_channels` before the first batch."""

    def numbers(self) -> dict[str, Tensor]:
        """The numbers that say where the grid lies, () or (C,), by name; {} where there are none to set."""
        return {}

    @torch.no_grad()
    def set_numbers(self, **numbers: Tensor | float) -> None:
        """Set all that `numbers()` gives. Raises ConfigError for other names."""
        known = self.numbers()
        if numbers.keys() != known.keys():
            names = ", ".join(known) or "none to set"
            raise ConfigError(f"the numbers of {type(self).__name__} are: {names}; got {', '.join(numbers) or 'none'}")
        self._set_numbers(**numbers)

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        """`set_numbers` for names that are right."""

    pinned: Tensor
    """The shape of the weight that is pinned, float32; there only while one is."""

    @torch.no_grad()
    def pin(self, weight: Tensor, observe: bool = True) -> None:
        """Keep the numbers that this weight gives now, until `unpin()`; does nothing where a weight is pinned already.

        What is pinned does not change by observing, in no state and by no training: parameters that the quantizer
        learns take no gradient. It is saved with the `state_dict`. `set_numbers` still sets the numbers. Of formats
        whose blocks take their scale from their own elements these scales are kept. `observe=False` keeps the numbers
        that the quantizer has, of whatever weight they are.

        weight: as `quantize` gets it. Raises UnobservedRangeError if there are no numbers to keep, ConfigError for
        schemes whose numbers no weight gives.

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
        """What a pin keeps of this weight beside the numbers that the quantizer holds anyway, by the names in `kept`.

        Raises ConfigError where no weight gives the numbers.
        """
        return {}
