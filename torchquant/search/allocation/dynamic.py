"""The allocation problem by dynamic programming: exact where every cost is a sum over places, without scipy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from torchquant.errors import ConfigError
from torchquant.search.allocation.solvers import Keeps, Problem

MAX_STATES = 50_000
BLOCK = 512
N_CYCLES = 4
Array = np.ndarray[Any, np.dtype[Any]]


def solve_dp(problem: Problem, keeps: Keeps | None = None, max_states: int = MAX_STATES) -> list[int]:
    """The least harmful picks by dynamic programming over the places; exact, for any number of constraints.

    After each place a state is what has been spent and the harm so far. A state goes if another is no worse in all of
    these, if the rest cannot be had within a limit, or if its Lagrangian bound is above a known choice. `keeps`: as
    in `solve_ilp`. Raises ConfigError for costs with products of two places, for limits that nothing keeps, and for
    more than `max_states` states: several constraints on many places.

    >>> solve_dp(Problem([[0.9, 0.1], [0.2, 0.0]], [[[2, 8], [2, 8]]], [10]))
    [1, 0]
    """
    keeps = keeps or problem.keeps
    problem = problem.separated()
    if problem.products:
        raise ConfigError(
            "dynamic programming is for costs that add up; bit operations of searched weights and searched activations "
            "do not. Take solver='ilp'"
        )
    search = _Search(problem, max_states)
    for picks in search.finished():
        if keeps(picks):
            return picks
    raise problem.no_choice()


class _Search:
    def __init__(self, problem: Problem, max_states: int) -> None:
        self.max_states = max_states
        self.harms = [np.array(harms, dtype=np.float64) for harms in problem.harms]
        n_places, n_rows = len(self.harms), len(problem.costs)
        self.costs = [
            np.array([row[place] for row in problem.costs], dtype=np.float64).reshape(n_rows, -1)
            for place in range(n_places)
        ]
        least = [cost.min(1, keepdims=True) for cost in self.costs]
        self.costs = [cost - floor for cost, floor in zip(self.costs, least, strict=True)]
        given = np.array(problem.limits, dtype=np.float64)
        self.limits = given - sum(least, np.zeros((n_rows, 1)))[:, 0]
        self.loose, self.tight = (self.limits + rounding * np.abs(given) for rounding in (1e-12, -1e-12))
        spreads = [sum(float(np.ptp(cost[row])) for cost in self.costs) or 1.0 for row in range(n_rows)]
        self.units = (sum(float(np.ptp(h)) for h in self.harms) or 1.0) / np.array(spreads)
        self.prices, self.bound = self._prices()
        reduced = [float((h + self.prices @ c).min()) for h, c in zip(self.harms, self.costs, strict=True)]
        self.rest_bound = [sum(reduced[place + 1 :]) - float(self.prices @ self.limits) for place in range(n_places)]

    def finished(self) -> Iterator[list[int]]:
        """Picks of the states that are left at the end, the least harmful first."""
        harm, spent = np.zeros(1), np.zeros((len(self.limits), 1))
        steps: list[tuple[Array, Array]] = []
        for place in range(len(self.harms)):
            n_options = len(self.harms[place])
            parents = np.repeat(np.arange(len(harm)), n_options)
            options = np.tile(np.arange(n_options), len(harm))
            harm = harm[parents] + self.harms[place][options]
            spent = spent[:, parents] + self.costs[place][:, options]
            inside = (spent <= self.loose[:, None]).all(0)
            inside &= harm + self.prices @ spent + self.rest_bound[place] <= self.bound
            kept = np.flatnonzero(inside)
            kept = kept[_undominated(harm[kept], spent[:, kept])]
            if len(kept) > self.max_states:
                raise ConfigError(f"dynamic programming needs more than {self.max_states} states; take solver='ilp'")
            harm, spent = harm[kept], spent[:, kept]
            steps.append((parents[kept], options[kept]))
        for state in np.argsort(harm, kind="stable"):
            yield self._walk(steps, int(state))

    @staticmethod
    def _walk(steps: list[tuple[Array, Array]], state: int) -> list[int]:
        picks = []
        for parents, options in reversed(steps):
            picks.append(int(options[state]))
            state = parents[state]
        return picks[::-1]

    def _prices(self) -> tuple[Array, float]:
        """Prices of the constraints that make the Lagrangian bound high, and the harm of a choice within the limits.

        Each price in turn is set by bisection to where its constraint holds. Any prices give a valid bound.
        """
        prices = np.zeros(len(self.limits))
        best = self._try(prices)
        for _ in range(N_CYCLES if len(prices) > 1 else 1):
            for row in range(len(prices)):
                low, prices[row] = 0.0, self.units[row]
                while self._is_over(prices, row) and prices[row] < 1e12 * self.units[row]:
                    prices[row] *= 8.0
                high = prices[row]
                for _ in range(40):
                    prices[row] = (low + high) / 2
                    low, high = (prices[row], high) if self._is_over(prices, row) else (low, prices[row])
                prices[row] = high
                best = min(best, self._try(prices))
        rounding = sum(float(np.abs(h).max()) for h in self.harms) + float(prices @ np.abs(self.limits))
        return prices, best + 1e-9 * rounding

    def _is_over(self, prices: Array, row: int) -> bool:
        return bool(self._spent(self._cheapest(prices))[row] > self.limits[row])

    def _cheapest(self, prices: Array) -> list[int]:
        return [int((h + prices @ c).argmin()) for h, c in zip(self.harms, self.costs, strict=True)]

    def _spent(self, picks: Sequence[int]) -> Array:
        return sum((c[:, pick] for c, pick in zip(self.costs, picks, strict=True)), np.zeros(len(self.limits)))

    def _try(self, prices: Array) -> float:
        """Harm of the choice that the prices make, with better options where there is room; inf beyond the limits."""
        picks = self._cheapest(prices)
        spent = self._spent(picks)
        if (spent > self.tight).any():
            return float("inf")
        while True:
            best = (0.0, -1, -1)
            for place, (harms, costs) in enumerate(zip(self.harms, self.costs, strict=True)):
                gains = harms[picks[place]] - harms
                fits = np.all(spent[:, None] + costs - costs[:, [picks[place]]] <= self.tight[:, None], axis=0)
                option = int(np.where(fits, gains, -1.0).argmax())
                if fits[option] and gains[option] > best[0]:
                    best = (float(gains[option]), place, option)
            if best[1] < 0:
                return float(sum(h[pick] for h, pick in zip(self.harms, picks, strict=True)))
            _, place, option = best
            spent = spent + self.costs[place][:, option] - self.costs[place][:, picks[place]]
            picks[place] = option


def _undominated(harm: Array, spent: Array) -> Array:
    """Indices of states that no other is as good as in everything; the first of equal ones."""
    order = np.lexsort((*spent[::-1], harm))
    if len(spent) == 0 or len(order) == 0:
        return order[:1]
    if len(spent) == 1:
        sorted_cost = spent[0, order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_cost[:-1]]))
        return order[sorted_cost < before]
    kept = np.empty((len(spent), 0))
    found = []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        costs = spent[:, block]
        rivals = np.concatenate([kept, costs], axis=1)
        beaten = np.all(rivals[:, :, None] <= costs[:, None, :], axis=0)
        own = np.arange(len(block))
        beaten[kept.shape[1] :] &= own[:, None] < own[None, :]
        alive = block[~beaten.any(0)]
        found.append(alive)
        if kept.shape[1] < 4 * BLOCK:  # beyond, some dominated states stay: slower, not wrong
            kept = np.concatenate([kept, spent[:, alive]], axis=1)
    return np.concatenate(found)
