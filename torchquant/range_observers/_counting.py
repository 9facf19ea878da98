"""The base of observers that count all data in a histogram and choose the range from it on demand."""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._tensors import like
from torchquant.errors import ConfigError
from torchquant.kernels import Kernel
from torchquant.quantizers_functional._gradient import compute_dtype
from torchquant.range_observers._base import RangeObserver
from torchquant.range_observers._distributed import reduce_max, reduce_sum, world_size
from torchquant.range_observers._histogram import Bins, histogram, rebinned, widened
from torchquant.range_observers._statistics import StatisticTracker, ends_of, ordinary_zeros, rows

AT_ONCE = 2**18  # bins of an intermediate tensor
FEW = 2**14  # elements of a batch that is small enough to be counted together with the next ones
MOST_KEPT, MOST_BATCHES = 2**17, 64  # largest numbers of elements, and of batches, that wait to be counted
OBSERVERS_AT_ONCE = 8  # observers whose ranges are chosen in one search


def _numbers(low: Tensor, high: Tensor) -> list[float]:
    """Return the ends of rows, first the lower ones; on a CPU a few numbers compare faster than tensors."""
    return [low.item(), high.item()] if low.numel() == 1 else [*low.tolist(), *high.tolist()]


class CountingObserver(RangeObserver):
    """Counts its data; a subclass writes `choose`, which is called once for all batches since the last choice.

    `n_bins` equal bins over the range seen so far; a batch beyond it extends the range and the old counts are
    spread over the new bins. `decay` is the weight of the old counts when a batch comes: 1 keeps everything
    (activations), 0 the last batch only (weights). Ranks of torch.distributed add their counts.
    Source: docs/algorithms.md C3.

    Batches are only counted; the range is chosen when it is next needed: by `get_ranges`, by a quantizer, by
    `state_dict`, or when a QModule enters a state. With `decay=0` it is chosen at once, and no counts are kept.
    """

    statistics: tuple[str, ...] = ("range_min", "range_max", "histogram_min", "histogram_max", "counts")
    of_magnitude = False
    """Whether the bins count |x|, from 0 on."""
    counts_zeros = True
    """Whether the bins count elements that are exactly 0, which every grid has a level for."""
    histogram_min: Tensor
    histogram_max: Tensor
    _is_range_due = False
    """Whether batches were counted since the last choice of the range; until the next, it covers all data seen."""
    _bins: Any = (None, None)
    """Ends of the data seen, as `_numbers`, with their type, and the bins over them, for the next batch."""
    _uncounted: tuple[Tensor, ...] | list[Tensor] = ()
    """Rows of small batches inside the range seen that are yet to be counted: a few at once cost as much as one."""
    chosen_by: ClassVar[tuple[str, ...]] = ()
    """The attributes that `choose` reads: observers with equal ones are rows of one search. Without any, each observer
    has its own search, as in a subclass that overrides `choose` without declaring them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "choose" in cls.__dict__ and "chosen_by" not in cls.__dict__:
            cls.chosen_by = ()

    def __init__(self, n_bins: int, decay: float, axis: int | None, nonfinite: str) -> None:
        if not (isinstance(n_bins, int) and n_bins >= 16):
            raise ConfigError(f"n_bins must be a whole number from 16, got {n_bins!r}")
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay must be from 0 to 1, got {decay!r}")
        self.n_bins = n_bins
        self.decay = decay
        super().__init__(0.0, axis, nonfinite)
        self._buffers["counts"] = self.counts.to(torch.float64)

    @abstractmethod
    def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the range from counts (C, n_bins) of the data from low (C,) to high (C,). Two (C,), within these."""

    @property
    def keeps_counts(self) -> bool:
        """Whether counts are kept between observations; without them every observation chooses the range."""
        return self.decay > 0.0 or self.n_calls > 1

    @property
    def widths(self) -> Mapping[str, int]:  # type: ignore[override]
        """Number of bins per row of the buffer `counts`."""
        return {"counts": self.n_bins if self.keeps_counts else 0}

    @property
    def is_memoryless(self) -> bool:
        return not self.keeps_counts

    @property
    def counts(self) -> Tensor:
        """Number of elements in each bin, (n_bins,) or (C, n_bins) float64."""
        if "counts" not in self._buffers:  # not made yet
            raise AttributeError("counts")
        self._count_the_rest()
        return cast(Tensor, self._buffers["counts"])

    @property
    def range_min(self) -> Tensor:  # type: ignore[override]
        """Lower end of the range, () or (C,)."""
        return self._settled("range_min")

    @property
    def range_max(self) -> Tensor:  # type: ignore[override]
        """Upper end of the range, () or (C,)."""
        return self._settled("range_max")

    def _settled(self, name: str) -> Tensor:
        if name not in self._buffers:  # not made yet
            raise AttributeError(name)
        self.settle()
        return cast(Tensor, self._buffers[name])

    def settle(self) -> None:
        """Choose the range, if batches were counted since the last choice."""
        if self._is_range_due:
            self._is_range_due = False
            self._choose_range()

    def _choose_range(self) -> None:
        self._set_range(self._chosen(*self._seen()))

    @torch.no_grad()
    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the counts (C, n_bins) of all data seen, and the ends (C,), in float64."""
        counts, low, high = (
            (statistic if self.axis is not None else statistic[None]).to(torch.float64)
            for statistic in (self.counts, self.histogram_min, self.histogram_max)
        )
        return counts, low, high

    def _set_range(self, ends: Iterable[Tensor]) -> None:
        for name, end in zip(("range_min", "range_max"), ends, strict=True):
            cast(Tensor, self._buffers[name]).view(-1).copy_(end)

    def _alike(self) -> tuple[Any, ...] | None:
        """Return a key, equal for observers that can be rows of one search; None if this one cannot."""
        low, high = (cast(Tensor, self._buffers[name]) for name in ("histogram_min", "histogram_max"))
        if not self.chosen_by or self.axis is not None or low.device.type != "cpu":
            return None
        is_one_sided = low.item() >= 0.0 or high.item() <= 0.0  # then its ends are not searched separately
        return type(self), self.n_bins, is_one_sided, *(getattr(self, name) for name in self.chosen_by)

    @torch.no_grad()
    def _chosen(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the range from counts (C, n_bins) of all data seen from low to high, (C,); never beyond these."""
        chosen, has_mass = self.choose(counts, low, high), counts.sum(1) > 0
        return (
            torch.where(has_mass, torch.clamp(chosen[0], low, high), low),
            torch.where(has_mass, torch.clamp(chosen[1], low, high), high),
        )

    def _size_calls(self) -> None:
        """Give the counts their width; calls are joined in them, without extra buffers."""
        shape = self._shape_of("counts", self.counts.shape[:-1])
        if self.counts.shape != torch.Size(shape):
            self._buffers["counts"] = ordinary_zeros(shape, self.counts)

    def _take_in(
        self, values: Sequence[Tensor | float], x: Tensor, seen: Tensor | float, usable: Tensor | float
    ) -> None:
        """Store the numbers unchanged: the calls of a batch are joined in the counts."""
        self._average_in(values, seen, usable)
        self._next_call()
        self._is_range_due = self.keeps_counts

    def _observe(self, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        if not self._adds(x):
            super()._observe(x, measure)

    def _adds(self, x: Tensor) -> bool:
        """Add the counts of x if they are all that changes, or if a kernel does the rest too: most batches."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or world_size() > 1 or x.numel() == 0:
            return False
        is_new = not self.is_observed
        if self.decay != 1.0 or self.nonfinite != "raise" or (is_new and self.axis is not None):
            return False
        data, known = rows(x.detach(), self.axis), [math.inf, -math.inf] if is_new else self._known()
        if len(known) != 2 * data.shape[0]:
            return False
        is_small = x.numel() <= FEW
        kernel = None if is_small or self._uncounted else self._kernel(data)
        if kernel is None and not is_new and self._is_within(data, known):
            (self._add_later if is_small else self._add_counts)(data)
            self._after_counting()
            return True
        kernel = kernel or self._kernel(data)
        return kernel is not None and self._counted_by(kernel, data, known)

    def _is_within(self, x: Tensor, known: list[float]) -> bool:
        """Whether the ends of rows (C, n) are within those known; with NaN, they are not."""
        n = x.shape[0]
        now = _numbers(*(torch.aminmax(x) if n == 1 else ends_of(x)))
        return all(map(operator.le, known[:n], now[:n])) and all(map(operator.ge, known[n:], now[n:]))

    def _kernel(self, data: Tensor) -> Kernel | None:
        """Return the kernel for whole batches of rows (C, n), None where there is none."""
        ends, counts = (cast(Tensor, self._buffers[name]) for name in ("histogram_min", "counts"))
        is_wide = data.dtype == torch.float64 and ends.dtype != data.dtype
        return None if is_wide or counts.dtype != torch.float64 else kernels.find("batch", data)

    @torch.no_grad()
    def _counted_by(self, kernel: Kernel, data: Tensor, known: list[float]) -> bool:
        """Let a kernel count rows (C, n), and spread the counts so far where the ends move; False if it refuses."""
        counts = self.counts
        found = kernel(data, counts.view(len(data), -1), known, self.counts_zeros, self.of_magnitude)
        if isinstance(found, bool):
            if found:
                self._after_counting()
            return found
        (low, high), moved = found
        ends: list[Any] = (
            [low[0], high[0]] if self.axis is None else [torch.tensor(end, dtype=torch.float64) for end in (low, high)]
        )
        self._take_in([*ends, *ends, moved.view_as(counts)], data, 1.0, 1.0)
        self._note(True)
        return True

    def _after_counting(self) -> None:
        if not self._is_range_due:
            self._is_range_due = True
        self._next_call()

    def _known(self) -> list[float]:
        return _numbers(*(cast(Tensor, self._buffers[name]) for name in ("histogram_min", "histogram_max")))

    def _add_later(self, x: Tensor) -> None:
        """Count the rows x later, together with others; the caller may overwrite x from now on."""
        waiting = self._uncounted
        is_full = len(waiting) >= MOST_BATCHES or len(waiting) * x.numel() > MOST_KEPT
        if waiting and (is_full or waiting[0].dtype != x.dtype):
            self._count_the_rest()
            waiting = ()
        if waiting:
            cast(list[Tensor], waiting).append(x.clone())
        else:
            self.__dict__["_uncounted"] = [x.clone()]

    def _count_the_rest(self) -> None:
        """Count the deferred batches."""
        if self._uncounted and not torch.compiler.is_compiling():
            waiting, self.__dict__["_uncounted"] = self._uncounted, ()
            self._add_counts(torch.cat(list(waiting), 1))

    @torch.no_grad()
    def _add_counts(self, x: Tensor) -> None:
        """Add the counts of rows (C, n) inside the range seen."""
        x = x.to(compute_dtype(x))
        known = self._known(), x.dtype
        if self._bins[0] != known:
            seen = (cast(Tensor, self._buffers[name]) for name in ("histogram_min", "histogram_max"))
            ends = self.ends_of_bins(*(end.view(-1).to(torch.float64) for end in seen))
            self.__dict__["_bins"] = known, Bins(*ends, self.n_bins, x.dtype)
        found = self._bins[1].count(x, self.counts_zeros, self.of_magnitude)
        cast(Tensor, self._buffers["counts"]).view(len(x), -1).add_(found)

    def _kept(self) -> float | Tensor:
        """Return the weight of the old counts: 1 if they are of the same batch."""
        if self.n_calls == 1 or self.decay == 1.0:
            return self.decay
        return torch.where(cast(Tensor, self._buffers["calls_taken"]) == 0, self.decay, 1.0)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        low, high = (end.to(torch.float64) for end in ends_of(x))
        if world_size() > 1:
            negated, high = reduce_max(torch.stack([-low, high]))
            low = -negated
        n_kept = self.n_bins if self.keeps_counts else 0
        found: tuple[Tensor, ...]
        if not torch.compiler.is_compiling() and x.device.type == "cpu" and not bool((high - low).isfinite().all()):
            found = low, high, low, high, x.new_zeros(len(x), n_kept, dtype=torch.float64)  # will be refused
        elif n_kept:
            low, high, counts = self._joined(x, low, high)
            found = low, high, low, high, counts
        else:
            found = *self._chosen_at_once(x, low, high), low, high, x.new_zeros(len(x), 0, dtype=torch.float64)
        return found if self.axis is not None else tuple(statistic.squeeze(0) for statistic in found)

    def _count(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return reduce_sum(histogram(x, low, high, self.n_bins, self.counts_zeros, self.of_magnitude))

    def _chosen_at_once(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the range from these rows alone, some rows at a time; NaN and Inf stay."""
        at_once = len(x) if world_size() > 1 else max(1, AT_ONCE // self.n_bins)
        parts = list(zip(x.split(at_once), low.split(at_once), high.split(at_once), strict=True))
        chosen = [self._chosen(self._count(part, *self.ends_of_bins(*ends)), *ends) for part, *ends in parts]
        return torch.cat([ends[0] for ends in chosen]), torch.cat([ends[1] for ends in chosen])

    def _joined(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Join the ends and counts of x with those so far, from x and its ends."""
        if not self.is_observed:
            return low, high, self._count(x, *self.ends_of_bins(low, high))
        # Where no rank has elements there is no new batch.
        kept = torch.where(low > high, 1.0, like(self._kept(), low))
        is_known = kept > 0.0
        seen_low, seen_high, counts = (
            (statistic if self.axis is not None else statistic[None]).to(torch.float64)
            for statistic in (self.histogram_min, self.histogram_max, self.counts)
        )
        low = torch.where(is_known, torch.minimum(low, seen_low), low)
        high = torch.where(is_known, torch.maximum(high, seen_high), high)
        before, ends = self.ends_of_bins(seen_low, seen_high), self.ends_of_bins(low, high)
        return low, high, self._count(x, *ends) + kept[:, None] * rebinned(counts, *before, *ends)

    def ends_of_bins(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last edge of the bins over a range seen."""
        limit = torch.finfo(torch.float32).max
        low, high = (end.nan_to_num(0.0).clamp(-limit, limit) for end in (low, high))
        if self.of_magnitude:
            return torch.zeros_like(low), widened(torch.zeros_like(low), torch.maximum(-low, high))[1]
        return widened(low, high)

    def force_ranges(self, range_min: Tensor | float, range_max: Tensor | float) -> None:
        """Set the range by hand and forget the counts; later batches start a new histogram from there."""
        low = torch.as_tensor(range_min, dtype=torch.float64)
        high = torch.as_tensor(range_max, dtype=torch.float64)
        if bool((low > high).any()):
            raise ConfigError(f"range_min must not exceed range_max, got {range_min} and {range_max}")
        self.force(low, high, low, high, torch.zeros(*low.shape, self.widths["counts"], dtype=torch.float64))

    def force(self, *values: Tensor | float) -> None:
        super().force(*values)
        self._forget_what_is_due()

    def reset(self) -> None:
        super().reset()
        self._forget_what_is_due()

    def _forget_what_is_due(self) -> None:
        self._is_range_due = False
        self.__dict__["_uncounted"] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatisticTracker:
        self._count_the_rest()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "counts")
        width = self.widths["counts"]
        if isinstance(saved, Tensor) and saved.ndim and 0 in (saved.shape[-1], width) and saved.shape[-1] != width:
            # One of the two keeps counts, the other does not; the range is there in both.
            state_dict[prefix + "counts"] = saved.new_zeros(*saved.shape[:-1], width)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget_what_is_due()

    def __getstate__(self) -> dict[str, Any]:
        self._count_the_rest()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._size_calls()  # an older pickle has counts even if none are kept


def settle_together(trackers: Iterable[StatisticTracker]) -> None:
    """Settle all trackers; similar choices of ranges share one search, which costs little more than a single choice."""
    groups: dict[tuple[Any, ...], list[CountingObserver]] = defaultdict(list)
    for tracker in trackers:
        alike = tracker._alike() if isinstance(tracker, CountingObserver) and tracker._is_range_due else None
        if alike is None:
            tracker.settle()
        elif tracker not in groups[alike]:
            groups[alike].append(cast(CountingObserver, tracker))
    for group in groups.values():
        for start in range(0, len(group), OBSERVERS_AT_ONCE):
            some = group[start : start + OBSERVERS_AT_ONCE]
            seen = [torch.cat(parts) for parts in zip(*(observer._seen() for observer in some), strict=True)]
            low, high = some[0]._chosen(*seen)
            for row, observer in enumerate(some):
                observer._is_range_due = False
                observer._set_range((low[row : row + 1], high[row : row + 1]))
