"""The laws that every range observer must keep, as a function to check your own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._arguments import checked
from torchquant._shown import shown
from torchquant.errors import ConfigError, LawViolation, NonFiniteError
from torchquant.range_observers._base import RangeObserver


@dataclass(frozen=True)
class _Case:
    """An observer that has seen nothing, and a tensor for it: (4, 3, 60) with the slices of its axis unlike."""

    fresh: RangeObserver
    seen: RangeObserver
    x: Tensor

    def observed(self, *batches: Tensor, first: RangeObserver | None = None) -> RangeObserver:
        """Return a copy of the observer that has seen nothing, or of `first`, after these batches."""
        observer = copy.deepcopy(first or self.fresh)
        for batch in batches:
            observer.observe_batch(batch)
        return observer


def _require(holds: bool, detail: str) -> None:
    if not holds:
        raise AssertionError(detail)


def _same(a: RangeObserver, b: RangeObserver) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a.get_ranges(), b.get_ranges(), strict=True))


def ordered(case: _Case) -> None:
    """The range is () or (C,), finite, and its minimum is not above its maximum, even for a constant."""
    expected = () if case.fresh.axis is None else (case.x.shape[case.fresh.axis],)
    constants = (case.observed(torch.full_like(case.x, value)) for value in (0.0, -3.0, 1e-30, 1e30))
    for observer in (case.seen, *constants):
        low, high = observer.get_ranges()
        _require(low.shape == high.shape == expected, f"the range has the shape {tuple(low.shape)}, not {expected}")
        _require(
            bool((low <= high).all() and high.isfinite().all() and low.isfinite().all()), "the ends are not in order"
        )


def empty(case: _Case) -> None:
    """A tensor without elements changes nothing."""
    nothing = case.x[:, :, :0]
    _require(not case.observed(nothing).is_observed, "it counts as observed after an empty tensor")
    _require(_same(case.observed(nothing, first=case.seen), case.seen), "an empty tensor changes the range")


def nonfinite(case: _Case) -> None:
    """NaN and Inf are refused, and the range stays; with `nonfinite="ignore"` it stays finite."""
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = case.x.clone()
        bad.view(-1)[1] = value
        observer = case.observed(first=case.seen)
        with suppress(NonFiniteError):
            observer.observe_batch(bad)
            _require(observer.nonfinite == "ignore", f"{value} was not refused")
            _require(all(bool(end.isfinite().all()) for end in observer.get_ranges()), f"{value} is in the range")
            continue
        _require(_same(observer, case.seen), f"{value} was refused, but changed the range")


def per_channel(case: _Case) -> None:
    """A slice alone gets the same range as among others."""
    axis = case.fresh.axis
    for i in range(0 if axis is None else case.x.shape[axis]):
        assert axis is not None
        alone = case.observed(case.x.narrow(axis, i, 1)).get_ranges()
        together = case.seen.get_ranges()
        _require(all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True)), f"slice {i} alone differs")


def memoryless(case: _Case) -> None:
    """An observer that `is_memoryless` does not change when it observes the same tensor again."""
    if case.fresh.is_memoryless:
        _require(_same(case.observed(case.x, first=case.seen), case.seen), "the same tensor seen twice changes it")


def survives(case: _Case) -> None:
    """An observer loaded from a state_dict (strict, weights only) continues like the original."""
    observer, loaded, file = case.observed(first=case.seen), case.observed(), io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for one in (observer, loaded):
        one.observe_batch(2 * case.x)
    _require(_same(observer, loaded), "with a loaded state_dict it goes on in another way")


def forced(case: _Case) -> None:
    """`force_ranges` sets the range, `reset` forgets it."""
    observer = case.observed(first=case.seen)
    low, high = (torch.full_like(end, value) for end, value in zip(observer.get_ranges(), (-1.0, 2.0), strict=True))
    observer.force_ranges(low, high)
    _require(all(map(torch.equal, observer.get_ranges(), (low, high))), "it has not the range that was forced")
    observer.reset()
    _require(not observer.is_observed, "it counts as observed after reset()")
    observer.observe_batch(case.x)
    _require(_same(observer, case.seen), "after reset() it remembers what it saw before")


_LAWS: tuple[Callable[[_Case], None], ...] = (
    ordered,
    empty,
    nonfinite,
    per_channel,
    memoryless,
    survives,
    forced,
)


@checked
def check_observer(observer: RangeObserver) -> tuple[str, ...]:
    """Run the laws of range observers on yours, and return their names; nothing happens to the one you pass.

    It observes tensors of shape (4, 3, 60). Raises LawViolation, which names every failed law and the evidence;
    ConfigError for an axis that these tensors do not have.

    >>> from torchquant.range_observers import BatchMinMax
    >>> check_observer(BatchMinMax(axis=0))[:3]
    ('ordered', 'empty', 'nonfinite')
    """
    fresh, broken = copy.deepcopy(observer).cpu(), {}
    fresh._release()
    fresh.reset()
    x = torch.randn(4, 3, 60, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [5.0], [0.1]])
    if fresh.axis is not None and not -x.ndim <= fresh.axis < x.ndim:
        raise ConfigError(f"axis must be from {-x.ndim} to {x.ndim - 1}, or None, got {shown(fresh.axis)}")
    seen = copy.deepcopy(fresh)
    seen.observe_batch(x)
    for law in _LAWS:
        try:
            law(_Case(fresh, seen, x))
        except Exception as error:  # a law that crashes is a law that fails
            broken[law.__name__] = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
    if broken:
        raise LawViolation(", ".join(broken), "; ".join(f"[{n}] {d}" for n, d in broken.items()))
    return tuple(law.__name__ for law in _LAWS)
