"""Laws for algorithms that round: the levels beside a number."""

from __future__ import annotations

import torch

from torchquant.errors import NoCodesError
from torchquant.quantizers._laws.case import Case, Skip, require


def neighbours(case: Case) -> None:
    """`neighbours(x)` are levels, x is between them unless clipped, no level is, and `quantize(x)` is one of them."""
    x = case.wide()
    try:
        below, above = case.observed.neighbours(x)
    except NoCodesError as why:
        raise Skip(str(why)) from None
    y = case.observed(x)
    require(bool(((y == below) | (y == above)).all()), "quantize(x) is neither of its neighbours")
    inside = below < above
    require(bool(((below <= x) & (x <= above))[inside].all()), "x does not lie between its neighbours")
    if case.observed.levels_vary:
        return
    require(torch.equal(case.observed(below), below), "the level below is not its own quantized value")
    require(torch.equal(case.observed(above), above), "the level above is not its own quantized value")
    levels = case.observed.levels()
    channels = levels if case.axis is not None else [levels]
    for low, high, known in zip(case.slices(below), case.slices(above), channels, strict=True):
        distinct = known.unique()
        next_up = distinct[torch.searchsorted(distinct, low.contiguous(), right=True).clamp_max(len(distinct) - 1)]
        require(bool((high <= torch.maximum(next_up, low)).all()), "there is a level between the neighbours of x")
