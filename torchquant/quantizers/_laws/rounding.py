"""Laws for algorithms that round: the levels beside a number, and numbers that stay as they are."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from torchquant.errors import NoCodesError
from torchquant.quantizers._base import Quantizer
from torchquant.quantizers._laws.case import Case, Skip, require, same
from torchquant.range_observers._statistics import StatisticTracker


def neighbours(case: Case) -> None:
    """`neighbours(x)` are levels, x is between them unless clipped, no level is, and `quantize(x)` is one of them."""
    x, quantizer = case.wide(), case.pinned() if case.can_be_pinned else case.observed
    try:
        below, above = quantizer.neighbours(x)
    except NoCodesError as why:
        raise Skip(str(why)) from None
    y = quantizer(x)
    require(bool(((y == below) | (y == above)).all()), "quantize(x) is neither of its neighbours")
    inside = below < above
    require(bool(((below <= x) & (x <= above))[inside].all()), "x does not lie between its neighbours")
    if quantizer.levels_vary and not quantizer.is_pinned:
        return
    require(torch.equal(quantizer(below), below), "the level below is not its own quantized value")
    require(torch.equal(quantizer(above), above), "the level above is not its own quantized value")
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        between = quantizer(torch.lerp(below, above, share))
        require(bool(((between == below) | (between == above)).all()), "there is a level between the neighbours of x")
    if quantizer.levels_vary:
        return
    levels = quantizer.levels()
    channels = levels if case.axis is not None else [levels]
    for real, low, high, known in zip(case.slices(x), case.slices(below), case.slices(above), channels, strict=True):
        distinct = known.unique()
        next_up = distinct[torch.searchsorted(distinct, low.contiguous(), right=True).clamp_max(len(distinct) - 1)]
        require(bool((high <= torch.maximum(next_up, low)).all()), "there is a level between the neighbours of x")
        clamped = real.clamp(distinct[0], distinct[-1])
        require(bool(((low <= clamped) & (clamped <= high)).all()), "x within the levels is not between its neighbours")


def columns(case: Case) -> None:
    """`nearest` of columns of a pinned weight is what `quantize` makes of them in the whole."""
    quantizer = case.pinned()
    expected = quantizer(case.sample).flatten(1)
    some = torch.randperm(expected.shape[1], generator=torch.Generator().manual_seed(0))[:7]
    for index in (some, some[:1]):
        found = quantizer.nearest(case.sample.flatten(1)[:, index], index)
        require(
            torch.equal(found, expected[:, index]), f"nearest of the columns {index.tolist()} differs from quantize"
        )
        same = torch.equal(quantizer.column_rounder()(case.sample.flatten(1)[:, index], index), found)
        require(same, f"column_rounder of the columns {index.tolist()} differs from nearest")


def roundings(case: Case) -> None:
    """Each element up or down by chance: such levels stay through `preimage`, observing, codes and checkpoints."""
    bits = getattr(case.observed, "n_bits", 8)
    for dtype in (torch.float32, torch.bfloat16) if bits <= 8 else (torch.float32,):
        x = case.sample.to(dtype)
        quantizer = case.pinned(x)
        values = _rounded_by_chance(quantizer, x)
        weight = quantizer.preimage(values)
        require((weight.shape, weight.dtype) == (x.shape, x.dtype), f"preimage changed form in {dtype}")
        quantizer.pre_observe(weight)
        require(torch.equal(quantizer(weight), values), f"quantize(preimage(values)) differs from values in {dtype}")
        for other in _copies(case, quantizer) if dtype == torch.float32 else (quantizer,):
            require(torch.equal(other(weight), values), f"a copy of a pinned quantizer gives other values in {dtype}")
            try:
                decoded = other.decode(other.encode(weight), dtype)
            except NoCodesError:
                continue
            require(torch.equal(decoded, values), f"decode(encode(preimage(values))) differs from values in {dtype}")


def _rounded_by_chance(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Levels beside those of x: its neighbours, or those of the next codes where levels are in other units."""
    generator = torch.Generator().manual_seed(1)
    try:
        below, above = quantizer.neighbours(x)
    except NoCodesError:
        pass
    else:
        return torch.where(torch.rand(x.shape, generator=generator) < 0.5, below, above)
    try:
        codes = quantizer.encode(x)
    except NoCodesError:
        return quantizer(x).detach()
    moved = codes + torch.randint(-1, 2, x.shape, generator=generator, dtype=codes.dtype)
    return quantizer.decode(moved.clamp(*quantizer.code_range), x.dtype)


def _copies(case: Case, quantizer: Quantizer) -> Iterator[Quantizer]:
    yield quantizer
    yield copy.deepcopy(quantizer)
    loaded = copy.deepcopy(case.fresh)
    loaded.load_state_dict(quantizer.state_dict(), strict=True)
    require(loaded.is_pinned, "a state_dict does not bring its pin along")
    yield loaded


def pins(case: Case) -> None:
    """What is pinned does not change by observing, nor by pinning again; `unpin`, or a state without pins, ends it."""
    quantizer, other = case.pinned(), case.sample * 3.7
    before, expected = copy.deepcopy(quantizer.state_dict()), quantizer(case.sample)
    quantizer.pin(other)
    for seen in (other, case.sample / 2):
        quantizer.pre_observe(seen)
        quantizer.post_observe(seen)
        for part in quantizer.modules():
            if isinstance(part, StatisticTracker):
                part.observe_batch(seen)
    require(same(quantizer(case.sample), expected), "observing changes the output of a pinned quantizer")
    after = quantizer.state_dict()
    require(before.keys() == after.keys(), "observing changes which numbers a pinned quantizer has")
    require(all(same(before[key], after[key]) for key in after), "observing changes the numbers of a pinned quantizer")
    require(not any(p.requires_grad for p in quantizer.parameters()), "a parameter of a pinned quantizer is trained")
    never = copy.deepcopy(case.observed)
    never.pre_observe(case.sample)
    loaded = copy.deepcopy(quantizer)
    loaded.load_state_dict(never.state_dict(), strict=True)
    quantizer.unpin()
    for freed in (quantizer, loaded):
        learned = [p.requires_grad for p in freed.parameters()]
        require(learned == [p.requires_grad for p in never.parameters()], "what a pin froze is not trained afterwards")
        require(freed.state_dict().keys() == never.state_dict().keys(), "something is left of a pin that was taken off")
    never.pre_observe(other)
    for freed in (quantizer, loaded):
        freed.pre_observe(other)
        require(same(freed(case.sample), never(case.sample)), "a quantizer that was pinned observes otherwise")
