"""What every observer and every data-driven quantizer shares: statistics that survive.

A tracker declares names of statistics and says how to measure them on one tensor. This file keeps
them in buffers, averages them over batches, holds them in at least float32, refuses NaN and Inf,
and loads them back.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchquant._arguments import check_constructor, checked
from torchquant.errors import ConfigError, NonFiniteError, UnobservedRangeError
from torchquant.quantizers_functional.bn_fold import channel_view

NONFINITE = ("raise", "ignore")


def rows(x: Tensor, axis: int | None) -> Tensor:
    """x as (C, n): one row per slice of `axis`, or a single row."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def per_channel_view(value: Tensor, ndim: int, axis: int | None) -> Tensor:
    """A statistic, () or (C,), in a shape that broadcasts against `ndim` dimensions."""
    return value if axis is None or value.ndim == 0 else channel_view(value, ndim, axis)


def _is_finite(value: Tensor | float) -> bool:
    """Whether all of value is finite. A sum that is a number has only numbers in it, and is cheap."""
    if isinstance(value, Tensor):
        return math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())
    return math.isfinite(value)


def _widest(device: torch.device) -> torch.dtype:
    """float64, where the device has it: the type of Python's numbers, so that both give the same bits."""
    return torch.float32 if device.type == "mps" else torch.float64


def _move_towards(held: Tensor, value: Tensor | float, rate: Tensor | float) -> None:
    """Move `held`, in place, by the share `rate` of the way to `value`."""
    if not isinstance(value, Tensor):
        held.fill_(held.item() * (1.0 - rate) + value * rate)
    elif isinstance(rate, float) and rate == 1.0:
        held.copy_(value.detach())
    else:
        wide = _widest(held.device)
        moved = held.to(wide) * (1.0 - rate) + value.detach().to(wide) * rate
        held.view(-1).copy_(moved.view(-1))  # compiled code of torch 2.11 loses what is written to a () float64 tensor


@checked
class StatisticTracker(nn.Module):
    """Statistics of the tensors it is shown, averaged over batches.

    `momentum` 0 keeps the last batch only; mu in (0, 1) keeps an exponential average with bias
    correction: after t batches the weights are `(1-mu) mu**(t-i) / (1-mu**t)`. `axis` None measures
    the whole tensor, an integer measures each slice of that axis. `nonfinite="raise"` refuses a
    tensor with NaN or Inf, `"ignore"` takes each of them for 0.

    Buffers, one per statistic: () or (C,), at least float32 whatever `.half()` does to the model;
    and `observed_weight` (), 0 before the first batch. A subclass sets `statistics` and writes
    `measure(x)`, which returns one tensor per statistic, () or (C,), reduced over all ranks.

    On a CPU a refused tensor raises at once. On an accelerator and in compiled code a check would
    stall or break the graph: there such a batch leaves the statistics as they were.
    """

    statistics: tuple[str, ...]
    set_once: frozenset[str] = frozenset()
    """Statistics that the first tensor sets for good."""
    starts_at_first: bool = False
    """Whether an average starts at the first batch, with no bias correction after it."""
    widths: Mapping[str, int] = {}
    """Statistics that are a row of so many numbers, (L,) or (C, L), and not one number."""
    observed_weight: Tensor

    def __init__(self, momentum: float = 0.0, axis: int | None = None, nonfinite: str = "raise") -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"momentum must be in [0, 1), got {momentum!r}")
        if axis is not None and not isinstance(axis, int):
            raise ConfigError(f"axis must be None (per tensor) or an integer, got {axis!r}")
        if nonfinite not in NONFINITE:
            raise ConfigError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        self.momentum = momentum
        self.axis = axis
        self.nonfinite = nonfinite
        self.is_observed = False
        for name in self.statistics:
            self.register_buffer(name, torch.zeros(self._shape_of(name, () if axis is None else (0,))))
        self.register_buffer("observed_weight", torch.zeros(()))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_constructor(cls)

    @abstractmethod
    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        """The statistics of x, () or (C,) each, over all ranks. x has at least one element."""

    def allocate(self, n_channels: int) -> None:
        """Give per-channel buffers their size before the first batch; no-op per tensor."""
        if self.axis is not None:
            self._expect_channels(torch.Size([n_channels]))

    def observe_batch(self, x: Tensor) -> None:
        """Take one tensor into the statistics. An empty tensor changes nothing."""
        self._observe(x, self.measure)

    @property
    def is_memoryless(self) -> bool:
        """Whether seeing the same tensor twice in a row is the same as seeing it once."""
        return self.momentum == 0.0 or self.set_once.issuperset(self.statistics)

    def _observe(self, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        if x.numel() == 0 or (self.is_observed and self.set_once.issuperset(self.statistics)):
            return
        x = x.detach()
        if self.nonfinite == "ignore":
            x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
        seen = cast(Tensor, self._buffers["observed_weight"])
        held = [cast(Tensor, self._buffers[name]) for name in self.statistics]
        measured = [m if m.dtype == kept.dtype else m.to(kept.dtype) for m, kept in zip(measure(x), held, strict=True)]
        if self.axis is not None:
            self._expect_channels(measured[0].shape[:1])
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            finite = [torch.isfinite(m).all() for m in measured]
            usable = torch.stack(finite).all().to(_widest(x.device))
            self._take_in([torch.nan_to_num(m) for m in measured], seen.to(usable.dtype), usable)
        else:
            # Reading a number is free here, and arithmetic on numbers costs a tenth of that on small tensors.
            values = [m if m.ndim else m.item() for m in measured]
            if not all(_is_finite(value) for value in values):
                raise NonFiniteError(
                    f"{type(self).__name__} was shown a tensor with NaN or Inf, shape {tuple(x.shape)}; "
                    "find where it comes from, or build the observer with nonfinite='ignore'"
                )
            self._take_in(values, seen.item(), 1.0)
        if not self.is_observed:
            self.is_observed = True

    def _take_in(self, values: Sequence[Tensor | float], seen: Tensor | float, usable: Tensor | float) -> None:
        """Average one measurement in, given the observed weight so far; `usable` 0 changes nothing."""
        momentum = 0.0 if self.starts_at_first and not self.is_observed else self.momentum
        weight = seen * self.momentum + (1.0 - momentum)
        rate = (1.0 - momentum) / weight * usable
        for name, value in zip(self.statistics, values, strict=True):
            if not (self.is_observed and name in self.set_once):
                _move_towards(cast(Tensor, self._buffers[name]), value, rate)
        _move_towards(cast(Tensor, self._buffers["observed_weight"]), weight, usable)

    def _expect_channels(self, shape: torch.Size) -> None:
        """Size the buffers for a first batch; refuse another number of channels later."""
        known = cast(Tensor, self._buffers[self.statistics[0]]).shape[:1]
        if known == shape:
            return
        if self.is_observed:
            raise ConfigError(
                f"{type(self).__name__} has statistics of shape {tuple(known)}, the new tensor gives "
                f"{tuple(shape)}; call reset() first, or give each site a quantizer of its own"
            )
        self._resize(shape)

    def _shape_of(self, name: str, groups: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        return (*groups, self.widths[name]) if name in self.widths else tuple(groups)

    def _resize(self, groups: tuple[int, ...] | torch.Size) -> None:
        for name in self.statistics:
            buffer, shape = getattr(self, name), self._shape_of(name, groups)
            if buffer.shape != torch.Size(shape):
                setattr(self, name, buffer.new_zeros(shape))

    def force(self, *values: Tensor | float) -> None:
        """Set the statistics by hand, () or (C,) each, in the order of `statistics`."""
        tensors = [torch.as_tensor(v, dtype=torch.float64) for v in values]
        n_channels = {tuple(t.shape[:1]) for t in tensors if self.axis is not None}
        if len(tensors) != len(self.statistics) or len(n_channels) > 1:
            raise ConfigError(
                f"expected {len(self.statistics)} values of one shape ({', '.join(self.statistics)}), "
                f"got {len(tensors)} with shapes {sorted(tuple(t.shape) for t in tensors)}"
            )
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise NonFiniteError(f"{', '.join(self.statistics)} must be finite, got {values}")
        groups = tensors[0].shape[: 0 if self.axis is None else 1]
        for name, tensor in zip(self.statistics, tensors, strict=True):
            expected = self._shape_of(name, groups)
            if tensor.shape != torch.Size(expected) or (self.axis is not None and not groups):
                raise ConfigError(
                    f"axis={self.axis} takes {self._form(name)} for {name}, got shape {tuple(tensor.shape)}"
                )
        self._resize(groups)
        for name, tensor in zip(self.statistics, tensors, strict=True):
            getattr(self, name).copy_(tensor)
        self.observed_weight.fill_(1.0)
        self.is_observed = True

    def _form(self, name: str) -> str:
        if name in self.widths:
            return f"a ({'C, ' if self.axis is not None else ''}{self.widths[name]}) tensor"
        return "one number" if self.axis is None else "a (C,) tensor"

    def reset(self) -> None:
        """Forget everything seen."""
        for name in (*self.statistics, "observed_weight"):
            getattr(self, name).zero_()
        self.is_observed = False

    def get(self) -> tuple[Tensor, ...]:
        """The statistics, () or (C,) each. Raises UnobservedRangeError before the first batch."""
        if not self.is_observed:
            raise UnobservedRangeError(
                f"{type(self).__name__} has seen no data; run a batch in QModuleState.CALIBRATION "
                "or set its values by hand (force_ranges / force)"
            )
        return tuple(getattr(self, name) for name in self.statistics)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatisticTracker:
        """Follow device moves and `.double()`, but stay at float32 under `.half()` and the like."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(device=new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        first = state_dict.get(prefix + self.statistics[0])
        if first is not None:
            self._resize(first.shape[: 0 if self.axis is None else 1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_observed = bool(self.observed_weight > 0)

    def extra_repr(self) -> str:
        parts = [f"momentum={self.momentum}"] if self.momentum else []
        parts += [] if self.axis is None else [f"axis={self.axis}"]
        if not self.is_observed:
            parts.append("no data yet")
        elif self.axis is None:
            parts += [f"{n}={float(getattr(self, n)):.4g}" for n in self.statistics if n not in self.widths]
        return ", ".join(parts)
