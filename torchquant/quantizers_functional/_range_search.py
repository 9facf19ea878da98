"""Search for the range of least error: shrink the observed one step by step and keep the best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QuantizeRange = Callable[[Tensor, Tensor, Tensor], Tensor]


def best_range(
    values: Tensor,
    weights: Tensor | None,
    low: Tensor,
    high: Tensor,
    quantize: QuantizeRange,
    steps: int = 100,
    power: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """The range `gamma * (low, high)`, gamma = i / steps, of least `sum of weights |v - Q(v)|**power`.

    values: (C, n); weights: (C, n) >= 0, or None for 1. low, high: (C,). `quantize(values, low, high)` with (C, 1)
    ends. Equal errors: the largest gamma. Returns two (C,). docs/algorithms.md C5.
    """
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for i in range(steps, 0, -1):
        shrunk_low, shrunk_high = low * (i / steps), high * (i / steps)
        error = (quantize(values, shrunk_low[:, None], shrunk_high[:, None]) - values).abs()
        error = error.square() if power == 2.0 else error.pow(power)
        total = (error if weights is None else error * weights).sum(1)
        is_better = total < best
        best = torch.where(is_better, total, best)
        best_low = torch.where(is_better, shrunk_low, best_low)
        best_high = torch.where(is_better, shrunk_high, best_high)
    return best_low, best_high
