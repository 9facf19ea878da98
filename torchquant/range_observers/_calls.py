"""Sites that are called several times in one forward: their calls count as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.range_observers._pins import Pinnable


def widest(device: torch.device) -> torch.dtype:
    """Return float64 if the device has it: the type of Python's floats, so that both give the same bits."""
    return torch.float32 if device.type == "mps" else torch.float64


def _joined(how: str, so_far: Tensor, value: Tensor, share: Tensor) -> Tensor:
    """Join a statistic of the calls so far with that of one more call, which has `share` of all their elements."""
    if how in ("min", "max"):
        return torch.minimum(so_far, value) if how == "min" else torch.maximum(so_far, value)
    if how == "rms":
        return (so_far.square() * (1 - share) + value.square() * share).sqrt()
    return so_far * (1 - share) + value * share


class CallsOfABatch(Pinnable):
    """The state of a tracker during the calls of one batch: the average before them, and their joined statistics.

    `n_calls` successive observations are one batch. They are joined as ends, means or sizes, as `joined_by` says,
    before they enter the average over batches. Until the last call has come, the calls so far stand for the batch,
    and ends are never narrower than they were before it.
    """

    statistics: tuple[str, ...]
    set_once: frozenset[str]
    momentum: float
    starts_at_first: bool
    joined_by: ClassVar[Mapping[str, str]] = {}
    """Statistic -> "min", "max" or "rms": several calls are joined by the minimum, the maximum, or the root mean
    square; other statistics by the mean. Means are weighted by the elements of each call."""
    _n_calls = 1
    _calls_to_start = 0

    @property
    def is_observed(self) -> bool:
        """Whether there are statistics."""
        raise NotImplementedError

    @property
    def n_calls(self) -> int:
        """Number of successive observations in one batch; 1 unless the site is called several times in a forward."""
        return self._n_calls

    @n_calls.setter
    def n_calls(self, n_calls: int) -> None:
        if isinstance(n_calls, bool) or not (isinstance(n_calls, int) and n_calls >= 1):
            raise ConfigError(f"n_calls must be a whole number from 1, got {n_calls!r}")
        self._n_calls = n_calls
        device = cast(Tensor, self._buffers["observed_weight"]).device
        for name in ("calls_taken", "elements_taken", "weight_before"):
            self.register_buffer(name, torch.zeros((), dtype=widest(device), device=device), persistent=False)
        self._size_calls()
        self._begin_batch()

    @property
    def is_start_complete(self) -> bool:
        """Whether all calls of the first batch have come, which fixes the statistics in `set_once`."""
        return self._calls_to_start == 0

    def _begin_batch(self) -> None:
        """Make the next observation the first of a batch."""
        if self._n_calls > 1:
            cast(Tensor, self._buffers["calls_taken"]).zero_()
            self._calls_to_start = 0 if self.is_observed else self._n_calls

    def _size_calls(self) -> None:
        """Give the extra buffers, which no checkpoint holds, the shapes of the statistics."""
        for name in self.statistics if self._n_calls > 1 else ():
            for part in ("before", "joined"):
                like = torch.zeros_like(cast(Tensor, self._buffers[name]))
                self.register_buffer(f"{name}_{part}", like, persistent=False)

    def _next_call(self) -> None:
        """Count a call, whether it had elements or not."""
        if self._n_calls == 1:
            return
        taken = cast(Tensor, self._buffers["calls_taken"])
        taken.view(-1).copy_(((taken + 1) % self._n_calls).view(-1))
        if self._calls_to_start:
            self._calls_to_start -= 1

    def _take_in_call(self, values: Sequence[Tensor], count: Tensor, usable: Tensor) -> None:
        """Average in the calls of the batch so far, in place of those before this call.

        values: statistics of this call, finite. count: its elements. usable: 0 for a call to be ignored.
        """
        numbers = [cast(Tensor, self._buffers[name]) for name in ("calls_taken", "elements_taken", "weight_before")]
        taken, elements, kept_weight = numbers
        weight = cast(Tensor, self._buffers["observed_weight"])
        is_first, is_last = taken == 0, taken + 1 == self._n_calls
        known = torch.where(is_first, torch.zeros_like(elements), elements)
        total = known + count * usable
        share = count * usable / total.clamp_min(1.0)
        before_weight = torch.where(is_first, weight.to(kept_weight.dtype), kept_weight)
        is_new = before_weight <= 0
        momentum = torch.where(is_new, 0.0, self.momentum) if self.starts_at_first else self.momentum
        new_weight = before_weight.clamp_min(0.0) * self.momentum + (1.0 - momentum)
        rate = (1.0 - momentum) / new_weight
        for name, value in zip(self.statistics, values, strict=True):
            buffers = [cast(Tensor, self._buffers[n]) for n in (name, f"{name}_before", f"{name}_joined")]
            held, kept, so_far = (buffer.to(rate.dtype) for buffer in buffers)
            before, value, how = torch.where(is_first, held, kept), value.to(rate.dtype), self.joined_by.get(name, "")
            joined = torch.where(known > 0, _joined(how, so_far, value, share), value)
            joined = torch.where(usable > 0, joined, so_far)
            if name in self.set_once:
                new = torch.where(is_new, joined, before)
            else:
                new = before * (1.0 - rate) + joined * rate
                if how in ("min", "max"):
                    new = torch.where(is_last | is_new, new, _joined(how, before, new, share))
            for buffer, result in zip(buffers, (torch.where(total > 0, new, before), before, joined), strict=True):
                buffer.view(-1).copy_(result.view(-1))
        weights = torch.where(total > 0, new_weight, before_weight), before_weight
        for buffer, result in zip((weight, kept_weight, elements), (*weights, total), strict=True):
            buffer.view(-1).copy_(result.view(-1))
        self._next_call()
