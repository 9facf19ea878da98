"""Search for the range of least error: shrink the observed range step by step and keep the best one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant.quantizers_functional._row_statistics import WHOLE, Joining, row_sums

AT_ONCE = 2**21  # elements of an intermediate tensor

QuantizeRange = Callable[[Tensor, Tensor, Tensor], Tensor]


def best_range(
    values: Tensor,
    weights: Tensor | None,
    low: Tensor,
    high: Tensor,
    quantize: QuantizeRange,
    steps: int = 100,
    power: float = 2.0,
    parts: Joining = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Find the range `gamma * (low, high)`, gamma = i / steps, of least `sum of weights |v - Q(v)|**power`.

    values: (C, n); weights: (C, n) >= 0, or None for 1. low, high: (C,). `quantize(values, low, high)` gets
    (c, 1, n) values and (c, g, 1) ends. Equal errors: the largest gamma. `parts`: how the errors over parts of the rows
    are joined. Returns two (C,). docs/algorithms.md C5.
    """
    gammas = torch.arange(steps, 0, -1, dtype=low.dtype, device=low.device) / steps
    n_rows, n = values.shape
    rows_at_once = max(1, AT_ONCE // (steps * n))
    gammas_at_once = max(1, AT_ONCE // (rows_at_once * n))
    errors = []
    for start in range(0, n_rows, rows_at_once):
        some = slice(start, start + rows_at_once)
        of_rows = []
        for factors in gammas.split(gammas_at_once):
            ends = (end[some, None, None] * factors[:, None] for end in (low, high))
            error = (quantize(values[some, None], *ends) - values[some, None]).abs()
            error = error.square() if power == 2.0 else error.pow(power)
            of_rows.append((error if weights is None else error * weights[some, None]).sum(-1))
        errors.append(torch.cat(of_rows, 1))
    best = gammas[parts.sum(torch.cat(errors)).argmin(1)]
    return low * best, high * best


def refitted_step(
    rows: Tensor, step: Tensor, qmin: int, qmax: int, iterations: int = 10, parts: Joining = WHOLE
) -> Tensor:
    """Find the step of least squared error of `step * {qmin .. qmax}` on each row, near a first guess. (C,).

    rows: (C, n). step: (C,), > 0. From half to twice the guess: assign every element to its nearest code q, take
    `<x, q> / <q, q>` for the step, `iterations` times; the error never rises. The best of the starts is kept. `parts`:
    how the sums over parts of the rows are joined.
    docs/algorithms.md 0.4.
    """
    steps = torch.stack([step * factor for factor in (1.0, 0.7, 0.5, 1.4, 2.0)])

    def codes(step: Tensor) -> Tensor:
        return torch.div(rows, step.to(rows.dtype)[:, None]).round_().clamp_(qmin, qmax)

    for _ in range(iterations):
        sums = [torch.stack([row_sums(rows * q), row_sums(q.square())]) for q in map(codes, steps)]
        along, square = parts.sum(torch.stack(sums, 1))
        refit = along / square.clamp_min(1.0)
        steps = torch.where((square > 0) & (refit > 0), refit, steps)
    errors = [row_sums(codes(found).mul_(found.to(rows.dtype)[:, None]).sub_(rows).square_()) for found in steps]
    best_error, best = torch.full_like(step, torch.inf), step
    for found, error in zip(steps, parts.sum(torch.stack(errors)), strict=True):
        is_better = error < best_error * (1 - 1e-9)
        best_error, best = torch.where(is_better, error, best_error), torch.where(is_better, found, best)
    return best
