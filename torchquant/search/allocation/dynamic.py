"""Solve the allocation problem by dynamic programming: exact where every cost is a sum over points, without scipy."""

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
    """Find the picks of least degradation by dynamic programming over the points; exact, for any number of constraints.

    After each point a state is the cost so far and the degradation so far. A state is dropped if another is no worse in
    all of these, if the rest does not fit within a limit, or if its Lagrangian bound is above a known choice. `keeps`:
    as in `solve_ilp`. Raises ConfigError for costs with products of two points, for limits that no choice keeps, and
    for more than `max_states` states: several constraints on many points.

    >>> solve_dp(Problem([[0.9, 0.1], [0.2, 0.0]], [[[2, 8], [2, 8]]], [10]))
    [1, 0]
    """
    keeps = keeps or problem.keeps
    problem = problem.separated()
    if problem.products:
        raise ConfigError(
            "dynamic programming needs costs that are sums over search points; bit operations of searched weights and "
            "searched activations are products. Use solver='ilp'"
        )
    search = _Search(problem, max_states)
    for picks in search.finished():
        if keeps(picks):
            return picks
    raise problem.no_choice()


class _Search:
    def __init__(self, problem: Problem, max_states: int) -> None:
        self.max_states = max_states
        self.degradations = [np.array(degradations, dtype=np.float64) for degradations in problem.degradations]
        n_points, n_rows = len(self.degradations), len(problem.costs)
        self.costs = [
            np.array([row[point] for row in problem.costs], dtype=np.float64).reshape(n_rows, -1)
            for point in range(n_points)
        ]
        least = [cost.min(1, keepdims=True) for cost in self.costs]
        self.costs = [cost - floor for cost, floor in zip(self.costs, least, strict=True)]
        given = np.array(problem.limits, dtype=np.float64)
        self.limits = given - sum(least, np.zeros((n_rows, 1)))[:, 0]
        self.loose, self.tight = (self.limits + rounding * np.abs(given) for rounding in (1e-12, -1e-12))
        spreads = [sum(float(np.ptp(cost[row])) for cost in self.costs) or 1.0 for row in range(n_rows)]
        self.units = (sum(float(np.ptp(h)) for h in self.degradations) or 1.0) / np.array(spreads)
        self.prices, self.bound = self._prices()
        reduced = [float((h + self.prices @ c).min()) for h, c in zip(self.degradations, self.costs, strict=True)]
        self.rest_bound = [sum(reduced[point + 1 :]) - float(self.prices @ self.limits) for point in range(n_points)]

    def finished(self) -> Iterator[list[int]]:
        """Yield the picks of the remaining states, by rising degradation."""
        degradation, spent = np.zeros(1), np.zeros((len(self.limits), 1))
        steps: list[tuple[Array, Array]] = []
        for point in range(len(self.degradations)):
            n_options = len(self.degradations[point])
            parents = np.repeat(np.arange(len(degradation)), n_options)
            options = np.tile(np.arange(n_options), len(degradation))
            degradation = degradation[parents] + self.degradations[point][options]
            spent = spent[:, parents] + self.costs[point][:, options]
            inside = (spent <= self.loose[:, None]).all(0)
            inside &= degradation + self.prices @ spent + self.rest_bound[point] <= self.bound
            kept = np.flatnonzero(inside)
            kept = kept[_undominated(degradation[kept], spent[:, kept])]
            if len(kept) > self.max_states:
                raise ConfigError(f"dynamic programming needs more than {self.max_states} states; use solver='ilp'")
            degradation, spent = degradation[kept], spent[:, kept]
            steps.append((parents[kept], options[kept]))
        for state in np.argsort(degradation, kind="stable"):
            yield self._walk(steps, int(state))

    @staticmethod
    def _walk(steps: list[tuple[Array, Array]], state: int) -> list[int]:
        picks = []
        for parents, options in reversed(steps):
            picks.append(int(options[state]))
            state = parents[state]
        return picks[::-1]

    def _prices(self) -> tuple[Array, float]:
        """Find prices with a high Lagrangian bound, and the degradation of a choice within the limits.

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
        rounding = sum(float(np.abs(h).max()) for h in self.degradations) + float(prices @ np.abs(self.limits))
        return prices, best + 1e-9 * rounding

    def _is_over(self, prices: Array, row: int) -> bool:
        return bool(self._spent(self._cheapest(prices))[row] > self.limits[row])

    def _cheapest(self, prices: Array) -> list[int]:
        return [int((h + prices @ c).argmin()) for h, c in zip(self.degradations, self.costs, strict=True)]

    def _spent(self, picks: Sequence[int]) -> Array:
        return sum((c[:, pick] for c, pick in zip(self.costs, picks, strict=True)), np.zeros(len(self.limits)))

    def _try(self, prices: Array) -> float:
        """Compute the degradation of the choice under these prices, improved within the slack; inf over the limits."""
        picks = self._cheapest(prices)
        spent = self._spent(picks)
        if (spent > self.tight).any():
            return float("inf")
        while True:
            best = (0.0, -1, -1)
            for point, (degradations, costs) in enumerate(zip(self.degradations, self.costs, strict=True)):
                gains = degradations[picks[point]] - degradations
                fits = np.all(spent[:, None] + costs - costs[:, [picks[point]]] <= self.tight[:, None], axis=0)
                option = int(np.where(fits, gains, -1.0).argmax())
                if fits[option] and gains[option] > best[0]:
                    best = (float(gains[option]), point, option)
            if best[1] < 0:
                return float(sum(h[pick] for h, pick in zip(self.degradations, picks, strict=True)))
            _, point, option = best
            spent = spent + self.costs[point][:, option] - self.costs[point][:, picks[point]]
            picks[point] = option


def _undominated(degradation: Array, spent: Array) -> Array:
    """Return the indices of the states that no other state dominates; the first of equal ones."""
    order = np.lexsort((*spent[::-1], degradation))
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
        if kept.shape[1] < 4 * BLOCK:  # beyond this size some dominated states stay: slower, not wrong
            kept = np.concatenate([kept, spent[:, alive]], axis=1)
    return np.concatenate(found)
