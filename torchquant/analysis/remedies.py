"""The changes of a quantizer that may help a slot: each is a new quantizer, and the causes that it answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torchquant.errors import TorchQuantError
from torchquant.quantizers import Quantizer, QuantSpec, find_scheme, make_quantizer
from torchquant.quantizers._spec import takes_observer
from torchquant.range_observers._statistics import StatisticTracker

OBSERVE = "observe again"


@dataclass(frozen=True)
class Change:
    """A new quantizer for a slot. `spec`: what it is made from; None for a quantizer that keeps its kind.

    `answers`: the causes that it is a remedy for.
    """

    what: str
    new: Quantizer
    spec: str | None
    answers: tuple[str, ...]


_RANGES = ("clipped", "range too wide", "killed channels", "one level", "unused levels", "outliers")
_CHANNELS = ("batch norm gain", "channels differ", "killed channels", "outliers")
_TAILS = ("outliers", "range too wide", "channels differ")


def changes_for(old: Quantizer, spec: str | None, is_weight: bool, is_linear: bool) -> Iterator[Change]:
    """Yield the changes that can be made of a quantizer, the simplest first.

    spec: its spec string, None if it is not known. is_linear: whether the values are read along their last axis.
    """
    site = "weight" if is_weight else "output"
    if spec is None:
        if any(isinstance(part, StatisticTracker) for part in old.modules()):
            yield Change(OBSERVE, _unseen(old), None, _RANGES)
        n_bits = getattr(old, "n_bits", None)
        known = None if n_bits is None else QuantSpec("affine", n_bits, (("symmetric", "narrow"),) if is_weight else ())
    else:
        yield from _made(OBSERVE, QuantSpec.parse(spec), site, _RANGES)
        known = QuantSpec.parse(spec)
    if known is None:
        return
    if is_weight and known.granularity in ("", "tensor"):
        yield from _made("per channel", replace(known, granularity="channel"), site, _CHANNELS)
    if takes_observer(find_scheme(known.scheme)[0]) and "observer" not in dict(known.options):
        for what, observer in (("range of least squared error", "mse"), ("range without outliers", "percentile")):
            yield from _made(what, _with(known, ("observer", observer)), site, _TAILS)
    if not is_weight and is_linear and known.granularity != "token":
        token = QuantSpec("affine", 8, (("symmetric", "narrow"),), "token")
        yield from _made("a scale for each token", token, site, ("calls differ", *_TAILS))
    if known.n_bits is not None and known.n_bits < 8:
        yield from _made("8 bits", replace(known, n_bits=8), site, ("few bits",))
        plain = QuantSpec("affine", known.n_bits, (("symmetric", "narrow"),), "channel") if is_weight else None
        if plain is not None and known.scheme != "affine":
            yield from _made("another scheme", _with(plain, ("observer", "mse")), site, ("few bits", *_CHANNELS))


def _with(spec: QuantSpec, option: tuple[str, str]) -> QuantSpec:
    return replace(spec, options=(*spec.options, option))


def _made(what: str, spec: QuantSpec, site: str, answers: tuple[str, ...]) -> Iterator[Change]:
    """Yield the change, unless the scheme cannot be made so."""
    try:
        yield Change(what, make_quantizer(spec, site), str(spec), answers)
    except TorchQuantError:
        return


def _unseen(old: Quantizer) -> Quantizer:
    """Copy a quantizer that has seen no data."""
    new = copy.deepcopy(old)
    new.unpin()
    for part in new.modules():
        if isinstance(part, StatisticTracker):
            part.reset()
    return new
