"""The bounds of codes counted from real 0, where numbers are clamped before they are quantized: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._tensors import like

Clamp = tuple[float | None, float | None]
Bound = Tensor | int


def code_bounds(
    x: Tensor, step: Tensor, low: Bound, high: Bound, zero_point: Bound = 0, clamp: Clamp | None = None
) -> tuple[Bound, Bound]:
    """Return the codes counted from real 0, `[low - zero_point, high - zero_point]`, narrowed to `x.clamp(*clamp)`.

    Clamping rounded quotients to these bounds equals, exactly for integers, rounding, adding the zero point, clamping
    and subtracting it again, and is two passes cheaper. A clamp of x maps to bounds of codes exactly, since dividing
    and rounding are monotone.
    """
    low, high = low - zero_point, high - zero_point
    least, most = clamp or (None, None)
    if least is not None:
        lowest = 0 if least == 0.0 else torch.round(like(least, x) / step)
        both_whole = isinstance(lowest, int) and isinstance(low, int)
        low = max(lowest, low) if both_whole else torch.maximum(like(low, x), like(lowest, x))
    if most is not None:
        highest = torch.minimum(like(high, x), torch.round(like(most, x) / step))
        high = torch.maximum(highest, like(low, x))
    return low, high
