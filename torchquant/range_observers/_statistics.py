"""The base of all observers and data-driven quantizers: statistics that are averaged and saved.

A tracker declares names of statistics and how to measure them on one tensor. This file keeps
them in buffers, averages them over batches, holds them in at least float32, refuses NaN and Inf,
and loads them back.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor

from torchquant import kernels
from torchquant._arguments import check_constructor, checked
from torchquant._tensors import ordinary_zeros as ordinary_zeros
from torchquant._tensors import per_channel_view as per_channel_view
from torchquant._tensors import rows as rows
from torchquant.errors import ConfigError, NonFiniteError, UnobservedRangeError
from torchquant.range_observers._calls import CallsOfABatch, widest
from torchquant.range_observers._distributed import observing, reduce_max, reduce_sum, world_size

NONFINITE = ("raise", "ignore")
MANY = 1 << 14
"""Elements from which on one pass of a kernel is faster than two native reductions."""
UNSEEN = -1e6
"""`observed_weight` before the first batch: a mean with models that saw data stays below 0 until the share of models
that saw none is below a millionth, so an average with unobserved numbers never counts as observed."""


def ends_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest element of each row of (C, n), (C,) each."""
    if len(rows) == 1:
        low, high = torch.aminmax(rows)
        return low.view(1), high.view(1)
    return ends_along(rows, 0)


def ends_along(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element of each slice of an axis, (C,) each."""
    kernel = kernels.find("min_max", x) if x.numel() >= MANY else None
    if kernel is not None:
        return cast("tuple[Tensor, Tensor]", kernel(x, axis))
    others = [d for d in range(x.ndim) if d != axis % x.ndim]
    # Two native reductions: aminmax along a dimension costs twenty times as much.
    return (x.amin(others), x.amax(others)) if others else (x.clone(), x.clone())


def check_saved(value: Any, key: str) -> None:
    """Raise NonFiniteError if the value of a key in a checkpoint is not finite."""
    if isinstance(value, Tensor) and not value.is_meta and not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"{key} of the state_dict holds NaN or Inf, which no quantizer can use; calibrate again, or find where "
            "it arose before it was saved"
        )


def _version(buffer: Tensor) -> int:
    """Return how often a tensor was written to; a tensor made in inference mode does not count its writes."""
    return -1 if buffer.is_inference() else buffer._version


def _is_finite(value: Tensor | float) -> bool:
    """Whether all of value is finite. A finite sum has only finite terms, and a sum is cheap."""
    if isinstance(value, Tensor):
        return math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())
    return math.isfinite(value)


def _move_towards(held: Tensor, value: Tensor | float, rate: Tensor | float) -> None:
    """Move `held`, in place, by the share `rate` of the way to `value`."""
    if not isinstance(value, Tensor):
        held.fill_(held.item() * (1.0 - rate) + value * rate)
    elif isinstance(rate, float) and rate == 1.0:
        held.copy_(value.detach())
    else:
        wide = widest(held.device)
        moved = held.to(wide) * (1.0 - rate) + value.detach().to(wide) * rate
        held.view(-1).copy_(moved.view(-1))  # compiled code of torch 2.11 loses writes to a () float64 tensor


@checked
class StatisticTracker(CallsOfABatch):
    """Statistics of the observed tensors, averaged over batches.

    `momentum` 0 keeps the last batch only; mu in (0, 1) keeps an exponential average with bias
    correction: after t batches the weights are `(1-mu) mu**(t-i) / (1-mu**t)`. `axis` None measures
    the whole tensor, an integer measures each slice of that axis. `nonfinite="raise"` refuses a
    tensor with NaN or Inf, `"ignore"` replaces each of them by 0.

    Buffers, one per statistic: () or (C,), at least float32 whatever `.half()` does to the model;
    and `observed_weight` (), above 0 once data was seen. A subclass sets `statistics` and writes
    `measure(x)`, which returns one tensor per statistic, () or (C,), reduced over all ranks. A rank whose tensor is
    empty takes part with the others and adds nothing; a tensor that is empty everywhere changes nothing.

    On a CPU a refused tensor raises at once. On an accelerator and in compiled code a check would
    stall or break the graph: there such a batch does not change the statistics.
    """

    statistics: tuple[str, ...]
    set_once: frozenset[str] = frozenset()
    """Statistics that the first tensor sets permanently."""
    starts_at_first: bool = False
    """Whether an average starts at the first batch, with no bias correction after it."""
    widths: Mapping[str, int] = {}
    """Width of the statistics that are a row of L numbers, (L,) or (C, L), not a single number."""
    _is_observed = False
    _noted: tuple[Tensor, int] | None = None
    """The buffer that last said whether there are statistics, and its version then."""
    observed_weight: Tensor

    def __init__(self, momentum: float = 0.0, axis: int | None = None, nonfinite: str = "raise") -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"momentum must be in [0, 1), got {momentum!r}")
        if nonfinite not in NONFINITE:
            raise ConfigError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        self.momentum = momentum
        self.axis = axis
        self.nonfinite = nonfinite
        for name in self.statistics:
            self.register_buffer(name, torch.zeros(self._shape_of(name, () if axis is None else (0,))))
        self.register_buffer("observed_weight", torch.full((), UNSEEN))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_constructor(cls)

    @property
    def is_observed(self) -> bool:
        """Whether the buffers hold statistics, whoever wrote them.

        Loaders and averages of models write them one by one. The answer is cached until the buffer is replaced or, on
        a CPU, written to; on an accelerator a check would stall, and compiled code cannot check. Both use the answer
        from the last change of state, which always checks.
        """
        if not torch.compiler.is_compiling() and self._is_news():
            self._take_note()
        return self._is_observed

    def look_again(self) -> bool:
        """Check the buffers again and return `is_observed`: a write through `.data` leaves no trace."""
        self._noted = None
        return self.is_observed

    def _is_news(self) -> bool:
        """Whether the buffer may have changed since the last check."""
        weight = cast(Tensor, self._buffers["observed_weight"])
        noted = self._noted
        if noted is not None and noted[0] is weight and self._is_observed:
            if not weight.is_cpu or _version(weight) == noted[1]:
                return False
        return not (weight.is_meta or isinstance(weight, FakeTensor) or is_functorch_wrapped_tensor(weight))

    def _take_note(self) -> None:
        """Record what the buffers say, which other code may have written."""
        self._note(bool(self.observed_weight > 0))

    def _note(self, is_observed: bool) -> None:
        if self._is_observed is not is_observed:
            self._is_observed = is_observed
        if not torch.compiler.is_compiling():
            weight = cast(Tensor, self._buffers["observed_weight"])
            self.__dict__["_noted"] = weight, _version(weight)  # setting it as a module's attribute costs much more

    @abstractmethod
    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        """Measure the statistics of x, () or (C,) each, over all ranks. x has at least one element.

        A rank without elements measures zeros instead, which the functions that join ranks leave out.
        """

    def allocate(self, n_channels: int) -> None:
        """Give per-channel buffers their size before the first batch; does nothing for per-tensor statistics."""
        if self.axis is not None:
            self._expect_channels(torch.Size([n_channels]))

    def observe_batch(self, x: Tensor) -> None:
        """Update the statistics with one tensor. An empty tensor changes nothing."""
        self._observe(x, self.measure)

    @property
    def is_memoryless(self) -> bool:
        """Whether seeing the same tensor twice in a row is the same as seeing it once."""
        return self.n_calls == 1 and (self.momentum == 0.0 or self.set_once.issuperset(self.statistics))

    def _observe(self, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        if self.set_once and self._is_settled:
            return
        is_alone = world_size() == 1
        if is_alone and x.numel() == 0:
            self._next_call()
            return
        x = x.detach()
        if self.nonfinite == "ignore":
            x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
        buffers: Any = self._buffers
        found = measure(x) if is_alone else self.over_ranks(x, measure)
        measured = [
            m if m.dtype == buffers[name].dtype else m.to(buffers[name].dtype)
            for name, m in zip(self.statistics, found, strict=True)
        ]
        if self.axis is not None:
            self._expect_channels(measured[0].shape[:1])
        seen = buffers["observed_weight"]
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            finite = [torch.isfinite(m).all() for m in measured]
            usable = torch.stack(finite).all().to(widest(x.device))
            self._take_in([torch.nan_to_num(m) for m in measured], x, seen.to(usable.dtype).clamp_min(0.0), usable)
        else:
            # Reading a number is free here, and arithmetic on numbers costs a tenth of arithmetic on small tensors.
            values = [m if m.ndim else m.item() for m in measured]
            if not all(map(_is_finite, values)):
                self._next_call()
                # All ranks have the same numbers, so all of them reach this check.
                if world_size() > 1 and not reduce_max(torch.tensor(float(x.numel() > 0))):
                    return
                raise NonFiniteError(self._why_refused(x))
            self._take_in(values, x, max(seen.item(), 0.0), 1.0)
        self._note(True)

    def _why_refused(self, x: Tensor) -> str:
        who, shape = type(self).__name__, tuple(x.shape)
        kept = self._buffers[self.statistics[0]]
        if x.numel() and bool(x.isfinite().all()) and kept is not None and kept.dtype != x.dtype:
            return (
                f"{who} was shown numbers up to {float(x.abs().max()):.4g}, shape {shape}, and keeps its statistics in "
                f"{kept.dtype}, which ends at {torch.finfo(kept.dtype).max:.4g}; call .to({x.dtype}) on the quantizer"
            )
        return (
            f"{who} was shown a tensor with NaN or Inf, shape {shape}; "
            "find where it comes from, or build the observer with nonfinite='ignore'"
        )

    @property
    def _is_settled(self) -> bool:
        """Whether no later batch can change the statistics."""
        return self.set_once.issuperset(self.statistics) and self.is_observed and self.is_start_complete

    def over_ranks(self, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Measure the statistics of a batch over all ranks; x is this rank's share of it."""
        if world_size() == 1:
            return measure(x)
        with observing(self._elements_a_row(x)):
            return measure(x if x.numel() else self._stand_in(x))

    def _elements_a_row(self, x: Tensor) -> int:
        return x.numel() // (1 if self.axis is None else max(x.shape[self.axis], 1))

    def _stand_in(self, x: Tensor) -> Tensor:
        """Make zeros in place of an empty tensor, as many as its shape needs."""
        shape = [size or 1 for size in x.shape]
        known = cast(Tensor, self._buffers[self.statistics[0]]).shape
        if self.axis is not None and x.shape[self.axis] == 0 and known[0] > 0:
            shape[self.axis] = known[0]
        return x.new_zeros(shape)

    def _take_in(
        self, values: Sequence[Tensor | float], x: Tensor, seen: Tensor | float, usable: Tensor | float
    ) -> None:
        """Average in one measurement of x, given the observed weight so far; `usable` 0 changes nothing."""
        if self.n_calls > 1:
            count = reduce_sum(torch.full((), self._elements_a_row(x), dtype=widest(x.device), device=x.device))
            self._take_in_call([torch.as_tensor(value) for value in values], count, torch.as_tensor(usable))
        else:
            self._average_in(values, seen, usable)

    def _average_in(self, values: Sequence[Tensor | float], seen: Tensor | float, usable: Tensor | float) -> None:
        buffers: Any = self._buffers
        fresh: Tensor | float = 1.0 - self.momentum
        if self.starts_at_first and isinstance(seen, Tensor):  # 0 also if every batch so far had NaN and was refused
            fresh = torch.full_like(seen, 1.0 - self.momentum).masked_fill_(seen == 0, 1.0)
        elif self.starts_at_first and not self.is_observed:
            fresh = 1.0
        weight = seen * self.momentum + fresh
        rate = fresh / weight * usable
        for name, value in zip(self.statistics, values, strict=True):
            if not (name in self.set_once and self.is_observed):
                _move_towards(buffers[name], value, rate)
        _move_towards(buffers["observed_weight"], weight, usable)

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
                setattr(self, name, ordinary_zeros(shape, buffer))
        self._size_calls()

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
        self._note(True)
        self._begin_batch()

    def _form(self, name: str) -> str:
        if name in self.widths:
            return f"a ({'C, ' if self.axis is not None else ''}{self.widths[name]}) tensor"
        return "one number" if self.axis is None else "a (C,) tensor"

    def reset(self) -> None:
        """Forget everything seen."""
        for name in self.statistics:
            getattr(self, name).zero_()
        self.observed_weight.fill_(UNSEEN)
        self._note(False)
        self._begin_batch()

    def settle(self) -> None:  # noqa: B027 - most have nothing to put off
        """Do work deferred while batches came, such as a search; called before the statistics are read or saved."""

    def get(self) -> tuple[Tensor, ...]:
        """Return the statistics, () or (C,) each. Raises UnobservedRangeError before the first batch."""
        if not self.is_observed:
            raise UnobservedRangeError(
                f"{type(self).__name__} has seen no data; run a batch in QModuleState.CALIBRATION "
                "or set its values by hand (force_ranges / force)"
            )
        self.settle()
        buffers = self._buffers
        return tuple([cast(Tensor, buffers[name]) for name in self.statistics])

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _wide_buffers(self) -> Iterable[str]:
        return self._buffers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (*self.statistics, "observed_weight", *self._parameters):
            check_saved(state_dict.get(prefix + name), prefix + name)
        first = state_dict.get(prefix + self.statistics[0])
        if first is not None:
            self._resize(first.shape[: 0 if self.axis is None else 1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.look_again()
        self._begin_batch()

    def extra_repr(self) -> str:
        parts = [f"momentum={self.momentum}"] if self.momentum else []
        parts += [] if self.axis is None else [f"axis={self.axis}"]
        if not self.is_observed:
            parts.append("no data yet")
        elif self.axis is None:
            parts += [f"{n}={float(getattr(self, n)):.4g}" for n in self.statistics if n not in self.widths]
        return ", ".join(parts)
