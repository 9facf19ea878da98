"""Turn a learned choice into one that keeps its budgets: greedy steps down, then up within the slack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchquant.errors import ConfigError
from torchquant.search.budget import Budget
from torchquant.search.cost import CostModel, SearchPoint, Selection

Scores = Mapping[SearchPoint, Sequence[float]]
"""SearchPoint -> estimated degradation of each option; lower is better."""
Groups = Sequence[Sequence[SearchPoint]]


def keep_budgets(
    costs: CostModel, budgets: Sequence[Budget], scores: Scores, choice: Selection, groups: Groups | None = None
) -> dict[SearchPoint, int]:
    """Take cheaper options, those of least degradation per saving first, until every budget holds.

    `groups`: points that must have the same option; None: each is alone. Raises ConfigError with the nearest choice if
    no choice is found that keeps all budgets together.
    """
    found = dict(choice)
    groups = groups or [[point] for point in costs.points]
    excess = costs.excess(found, budgets)
    while excess > 0.0:
        best: tuple[float, int, int] | None = None
        for index, group in enumerate(groups):
            for option in range(len(scores[group[0]])):
                saved = excess - costs.excess(found | dict.fromkeys(group, option), budgets)
                if saved > min(1e-12, excess / 2):
                    degradation = sum(scores[point][option] - scores[point][found[point]] for point in group)
                    best = min(best or (float("inf"), 0, 0), (degradation / saved, index, option))
        if best is None:
            cheapest = [costs.cheapest(budget.measure) for budget in budgets]
            for choice in (found | {p: c[g[0]] for g in groups for p in g} for c in cheapest):
                if costs.excess(choice, budgets) == 0.0:
                    return choice
            totals = costs.totals(found)
            least = ", ".join(f"{b.measure} {totals[b.measure]:g} for at most {b.limit:g}" for b in budgets)
            raise ConfigError(f"no choice keeps all budgets together; the nearest choice found has {least}")
        found |= dict.fromkeys(groups[best[1]], best[2])
        excess = costs.excess(found, budgets)
    return found


def spend_slack(
    costs: CostModel, budgets: Sequence[Budget], scores: Scores, choice: Selection, groups: Groups | None = None
) -> dict[SearchPoint, int]:
    """Take better options, the largest gains per cost first, as long as every budget holds."""
    found = dict(choice)
    groups = groups or [[point] for point in costs.points]
    while True:
        totals = costs.totals(found)
        best: tuple[float, int, int] | None = None
        for index, group in enumerate(groups):
            for option in range(len(scores[group[0]])):
                gain = sum(scores[point][found[point]] - scores[point][option] for point in group)
                if gain <= 0.0:
                    continue
                after = costs.totals(found | dict.fromkeys(group, option))
                if any(after[b.measure] > b.limit for b in budgets):
                    continue
                price = sum(max(after[b.measure] - totals[b.measure], 0.0) / b.limit for b in budgets)
                best = max(best or (-1.0, 0, 0), (gain / (price + 1e-12), -index, option))
        if best is None:
            return found
        found |= dict.fromkeys(groups[-best[1]], best[2])
