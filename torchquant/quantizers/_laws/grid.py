"""Laws of the grid: which values there are, and where they lie."""

from __future__ import annotations

import copy

import torch

from torchquant.errors import NoCodesError
from torchquant.quantizers._laws.case import DTYPES, Case, Skip, require


def on_grid(case: Case) -> None:
    """At most 2**n_bits distinct values, and `quantize(x) == decode(encode(x))`, in every type."""
    bits = case.n_bits()
    for dtype in DTYPES:
        x = case.wide(dtype)
        y = case.observed(x)
        distinct = max(part.unique().numel() for part in case.slices(y))
        require(distinct <= 2**bits, f"{distinct} distinct values from {bits} bits in {dtype}")
        try:
            decoded = case.observed.decode(case.observed.encode(x), dtype)
        except NoCodesError:
            continue
        require(torch.equal(decoded, y), f"decode(encode(x)) differs from quantize(x) in {dtype}")


def levels_used(case: Case) -> None:
    """More than half of the 2**n_bits codes can be reached, and `levels()` lists what is."""
    bits = case.n_bits()
    if bits > 10:
        raise Skip("more than 1024 levels")
    if case.observed.levels_vary:
        raise Skip(f"each {case.observed.about.granularity[0]} has levels of its own")
    reach = 40.0 * float(case.sample.abs().max())
    ramp = torch.cat([torch.linspace(-1, 1, 4001) * reach / 8, reach * torch.logspace(-9, 0, 2000)])
    ramp = torch.cat([ramp, -ramp])
    shape = [1] * case.sample.ndim
    if case.axis is None:
        x = ramp
    else:
        shape[case.axis], shape[case._free_axis()] = case.sample.shape[case.axis], -1
        x = ramp.expand(shape[case.axis], -1)
        x = (x.T if case.axis > case._free_axis() else x).reshape(shape)
    y = case.observed(x)
    fewest = min(part.unique().numel() for part in case.slices(y))
    require(fewest > 2**bits / 2, f"only {fewest} of {2**bits} levels are ever used")
    try:
        levels = case.observed.levels()
    except NoCodesError:
        return
    for part, known in zip(case.slices(y), levels if case.axis is not None else [levels], strict=True):
        require(bool((known.diff() >= 0).all()), "levels() is not sorted")
        require(bool(torch.isin(part.unique(), known).all()), "quantize gives a value that levels() does not list")


def idempotent(case: Case) -> None:
    """Quantizing what is quantized changes nothing."""
    if not case.observed.is_idempotent:
        raise Skip("its levels are not in the units of x")
    bits = getattr(case.observed, "n_bits", 8)
    for dtype in DTYPES if bits <= 8 else DTYPES[:2]:
        y = case.observed(case.wide(dtype))
        require(torch.equal(case.observed(y), y), f"quantize(quantize(x)) differs from quantize(x) in {dtype}")


def monotone(case: Case) -> None:
    """A larger input never gives a smaller output."""
    x = case.wide()
    for real, quantized in zip(case.slices(x), case.slices(case.observed(x)), strict=True):
        require(bool((quantized[real.argsort()].diff() >= 0).all()), "a larger input gave a smaller output")


def per_channel(case: Case) -> None:
    """A slice alone gives the same numbers as the same slice among others."""
    if case.axis is None:
        raise Skip("it works per tensor")
    together = case.observed(case.sample)
    for i in range(case.sample.shape[case.axis]):
        alone = copy.deepcopy(case.fresh)
        part = case.sample.narrow(case.axis, i, 1)
        alone.pre_observe(part)
        require(torch.equal(alone(part), together.narrow(case.axis, i, 1)), f"slice {i} alone differs")
