"""Look at some elements of a tensor for figures of its quantizer: sums on its device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd, prod

import torch
from torch import Tensor

from torchquant.errors import NoCodesError
from torchquant.quantizers import GridQuantizer, Quantizer
from torchquant.quantizers._grid import OwnScaleQuantizer
from torchquant.quantizers_functional._gradient import Clamp, compute_dtype
from torchquant.quantizers_functional.formats import Format, UniformGrid
from torchquant.range_observers._calls import widest

GOLDEN = 0.6180339887498949


@dataclass
class Tally:
    """The findings of the looks at one quantizer: sums over the elements that were looked at, 0-dimensional tensors.

    `n`: how many elements these were; `n_elements`: those of the whole tensors. `used`: 1 for each code that occurred,
    (codes,), None if it is not known which codes there are. `codes`: of the last tensor, (n,); None without codes.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    n: int = 0
    n_elements: int = 0
    used: Tensor | None = None
    codes: Tensor | None = None

    def add(self, other: Tally) -> None:
        """Add the looks of another tally at the same quantizer."""
        self.sums = {name: value + self.sums.get(name, 0) for name, value in other.sums.items()}
        self.n, self.n_elements = self.n + other.n, self.n_elements + other.n_elements
        is_first = self.used is None or other.used is None or self.used.shape != other.used.shape
        self.used = other.used if is_first else torch.maximum(self.used, other.used)  # type: ignore[arg-type]
        self.codes = other.codes


def spread_positions(n_elements: int, n: int | None, device: torch.device) -> Tensor | None:
    """Return n different positions among the elements of a tensor, (n,) int64; None for all of them.

    They are multiples of the golden section of the size, rounded to a number that has no factor in common with it: they
    cover every part of the tensor, and every channel of every layout, in equal shares, and are the same each time.
    """
    if n is None or n_elements <= n:
        return None
    step = round(n_elements * GOLDEN)
    while gcd(step, n_elements) != 1:
        step += 1
    return torch.arange(n, device=device) * step % n_elements


def taken(x: Tensor, positions: Tensor | None) -> Tensor:
    """Return the elements at these positions of x in the order of its axes, (n,); all of them for None."""
    if positions is None:
        return x.reshape(-1)
    return x.view(-1)[positions] if x.is_contiguous() else x[torch.unravel_index(positions, x.shape)]


@torch.no_grad()
def look_at(
    quantizer: Quantizer, x: Tensor, n: int | None, clamp: Clamp | None = None, is_latent: bool = False
) -> Tally:
    """Look at n elements of x, or of `x.clamp(*clamp)`, at a quantizer; None: at all.

    `is_latent`: whether x is a weight, whose distance to the thresholds counts. What does not exist for the scheme is
    not in the sums: codes of schemes without codes, or whose codes hold a scale of their own; clipping and errors of
    levels in other units.
    """
    x = x.detach()
    positions, format = spread_positions(x.numel(), n, x.device), _format_of(quantizer)
    is_elementwise = isinstance(quantizer, GridQuantizer) and not quantizer.levels_vary
    if format is not None and is_elementwise:  # a few elements, each on the levels of its channel
        format, shape = _of_elements(format, positions, x)
        x, positions, n_elements = taken(x, positions).view(shape), None, x.numel()
    else:
        n_elements = x.numel()
    x = x.to(compute_dtype(x))
    x = x if clamp is None else x.clamp(*clamp)
    has_codes = format is not None and not isinstance(quantizer, OwnScaleQuantizer)
    value, inside = (quantizer.quantize(x), None) if format is None else format.project(x, True)
    codes = taken(format.codes(x), positions).to(torch.int32) if format is not None and has_codes else None
    tally = Tally(n=x.numel() if positions is None else len(positions), n_elements=n_elements, codes=codes)
    if codes is not None:
        assert format is not None
        tally.used = _used(codes, *format.code_range)
    if quantizer.is_idempotent and tally.n:
        real, value = taken(x, positions), taken(value, positions)
        wide = widest(x.device)
        tally.sums |= {"signal": real.to(wide).square().sum(), "noise": (real - value).to(wide).square().sum()}
        if format is not None:
            clipped = torch.zeros_like(real) if inside is None else taken(inside, positions).eq(0)
            tally.sums |= {"below": (clipped * real.lt(value)).sum(), "above": (clipped * real.gt(value)).sum()}
        if is_latent and format is not None and is_elementwise:
            distance = _to_threshold(format, x, value.view(x.shape))
            tally.sums |= {} if distance is None else {"distance": distance.clamp_max(1.0).to(wide).sum()}
    return tally


def _format_of(quantizer: Quantizer) -> Format | None:
    """Return the format of a quantizer; None for one without codes."""
    try:
        format = quantizer.format()
        _ = format.code_range
    except NoCodesError:
        return None
    return format


def _of_elements(format: Format, positions: Tensor | None, x: Tensor) -> tuple[Format, tuple[int, ...]]:
    """Return the format with one channel for each of these elements of x, and a shape in which they lie on its axis."""
    axis = format.axis
    if axis is None or format.n_channels is None:
        return format, (-1,)
    where = torch.arange(x.numel(), device=x.device) if positions is None else positions
    channels = where // prod(x.shape[axis % x.ndim + 1 :]) % x.shape[axis]
    shape = (*[1] * axis, -1) if axis >= 0 else (-1, *[1] * (-axis - 1))
    return format.of_channels(channels), shape


def _used(codes: Tensor, low: int, high: int) -> Tensor | None:
    """Return 1 for each code that occurs, 0 for the others; None if there are more codes than elements."""
    n_codes = high - low + 1
    if n_codes > codes.numel():
        return None
    used = torch.zeros(n_codes, device=codes.device)
    return used.scatter_(0, (codes - low).clamp(0, n_codes - 1).to(torch.int64), 1.0)


def _to_threshold(format: Format, x: Tensor, value: Tensor) -> Tensor | None:
    """Return how far elements lie from the nearest threshold, in steps: distances of the two levels beside it."""
    if isinstance(format, UniformGrid) and type(format).thresholds is UniformGrid.thresholds:
        step, (low, high) = format.step(x), format.ends(x)
        off = (x - value) / step
        is_outward = (value.le(low) & off.lt(0)) | (value.ge(high) & off.gt(0))
        return torch.where(is_outward, 0.5 + off.abs(), 0.5 - off.abs())
    thresholds, gaps = format.thresholds().to(x), format.levels().to(x).diff(dim=-1)
    if not thresholds.shape[-1]:
        return None
    if thresholds.ndim == 1:
        thresholds, gaps = thresholds.expand(x.numel(), -1), gaps.expand(x.numel(), -1)
    x = x.reshape(-1, 1)
    above = torch.searchsorted(thresholds.contiguous(), x.contiguous())
    beside = torch.cat([above - 1, above], 1).clamp(0, thresholds.shape[-1] - 1)
    gap = gaps.gather(1, beside)
    distance = (x - thresholds.gather(1, beside)).abs() / torch.where(gap > 0, gap, torch.ones_like(gap))
    return torch.where(gap > 0, distance, 0.0).amin(1)


@torch.no_grad()
def steps_of(quantizer: Quantizer) -> Tensor | None:
    """Return the mean distance of adjacent levels, one for each part with levels of its own, (parts,).

    For a uniform grid it is the step. None if the parts compute their levels at every call, or without codes.
    """
    parts = [steps_of(part) for part in quantizer.children() if isinstance(part, Quantizer) and part.is_ready]
    if parts:
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    format = _format_of(quantizer)
    if format is None or not isinstance(quantizer, GridQuantizer) or quantizer.levels_vary:
        return None
    numbers, axis = format.numbers(), format.axis or 0
    n_axes = axis + 1 if axis >= 0 else -axis
    low, high = format.ends(torch.zeros([1] * n_axes, device=numbers[0].device if numbers else None))
    return ((high - low) / max(format.code_range[1] - format.code_range[0], 1)).flatten()


@torch.no_grad()
def gradient_of(quantizer: Quantizer) -> Tensor | None:
    """Return the norm of the gradient of all numbers that the quantizer learns, (); None without any."""
    gradients = [p.grad.to(widest(p.device)) for p in quantizer.parameters() if p.grad is not None]
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt() if gradients else None
