"""From what was learned to a choice that keeps its budgets: greedy steps down, then up where there is room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchquant.errors import ConfigError
from torchquant.search.budget import Budget
from torchquant.search.cost import Choice, CostModel, Place

Scores = Mapping[Place, Sequence[float]]
"""Place -> how bad each option is thought to be for the task; lower is better."""


def keep_budgets(costs: CostModel, budgets: Sequence[Budget], scores: Scores, choice: Choice) -> dict[Place, int]:
    """Cheaper options, the least harmful for what they save first, until every budget holds.

    Raises ConfigError with what is least, if no choice keeps all of them together.
    """
    found = dict(choice)
    excess = costs.excess(found, budgets)
    while excess > 0.0:
        best: tuple[float, int, int] | None = None
        for index, place in enumerate(costs.places):
            for option in range(len(scores[place])):
                saved = excess - costs.excess({**found, place: option}, budgets)
                if saved > 1e-12:
                    harm = scores[place][option] - scores[place][found[place]]
                    best = min(best or (float("inf"), 0, 0), (harm / saved, index, option))
        if best is None:
            totals = costs.totals(found)
            least = ", ".join(f"{b.measure} {totals[b.measure]:g} for at most {b.limit:g}" for b in budgets)
            raise ConfigError(f"no choice keeps all budgets together; the nearest that was found has {least}")
        found[costs.places[best[1]]] = best[2]
        excess = costs.excess(found, budgets)
    return found


def use_room(costs: CostModel, budgets: Sequence[Budget], scores: Scores, choice: Choice) -> dict[Place, int]:
    """Better options, the most useful for what they cost first, as long as every budget holds."""
    found = dict(choice)
    while True:
        totals = costs.totals(found)
        best: tuple[float, int, int] | None = None
        for index, place in enumerate(costs.places):
            for option in range(len(scores[place])):
                gain = scores[place][found[place]] - scores[place][option]
                if gain <= 0.0:
                    continue
                trial = {**found, place: option}
                if costs.excess(trial, budgets) > 0.0:
                    continue
                after = costs.totals(trial)
                price = sum(max(after[b.measure] - totals[b.measure], 0.0) / b.limit for b in budgets)
                best = max(best or (-1.0, 0, 0), (gain / (price + 1e-12), -index, option))
        if best is None:
            return found
        found[costs.places[-best[1]]] = best[2]
