"""Add the cost to the loss, with prices that rise while a budget is exceeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchquant.search.budget import Budget
from torchquant.search.settings import SearchSettings

NEAR = 0.15
"""Relative distance to a budget within which its price moves."""


class BudgetMultipliers:
    """A price per budget, updated after each step, and a penalty for exceeding it (docs/algorithms.md F3).

    With a penalty alone the cost settles above the budget, where penalty and task balance; the price keeps rising until
    the budget holds, as in an augmented Lagrangian. It moves only near the budget and decays far from it, so that no
    price builds up while the cost is still approaching. With `target`, a cost below the budget is drawn up to it in the
    same way. `reference`: the cost that `cost_weight` counts as 1.
    """

    def __init__(self, budgets: Sequence[Budget], settings: SearchSettings, reference: float) -> None:
        self.budgets = list(budgets)
        self.settings = settings
        self.reference = max(reference, 1e-30)
        self.values = torch.zeros(len(self.budgets), dtype=torch.float64)

    def loss(self, totals: Mapping[str, Tensor], epoch: int) -> Tensor:
        """Compute the term to add to the loss of the task. totals: the expected cost of each measure."""
        value = self.settings.cost_weight * totals[self.settings.cost_measure] / self.reference
        penalty = self.settings.penalty_at(max(epoch, 1))
        for price, budget in zip(self.values, self.budgets, strict=True):
            over = totals[budget.measure] / budget.limit - 1.0
            missed = over if self.settings.target else over.clamp_min(0.0)
            value = value + price * over + penalty * missed.square()
        return value

    @torch.no_grad()
    def move(self, totals: Mapping[str, Tensor]) -> None:
        """Update every price from the current cost."""
        if not self.budgets:
            return
        over = torch.stack([totals[b.measure].cpu() / b.limit - 1.0 for b in self.budgets])
        moved = torch.where(over < 0, 0.9 * self.values, self.values)
        moved = torch.where(over.abs() < NEAR, self.values + self.settings.price_rate * over, moved)
        self.values = moved if self.settings.target else moved.clamp_min(0.0)
