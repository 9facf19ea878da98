"""Define the allocation problem in plain numbers, and solve it by integer linear programming or greedily."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torchquant.errors import ConfigError, require

Row = Sequence[Sequence[float]]
"""One number for each [point][option]."""
Keeps = Callable[[Sequence[int]], bool]
"""Tells whether the picks, one option per point, keep the budgets."""
N_CUTS = 20
MARGIN = 1e-6
"""Approximate tolerance of HiGHS."""
SCALE = 1e3
"""Largest cost after scaling for the solver."""
SPREAD = 1e3
"""Largest difference of degradations after scaling for the solver, whose absolute gap is 1e-6."""


class NoChoiceError(ConfigError):
    """Raised when no choice keeps all limits together."""


@dataclass(frozen=True)
class Product:
    """A product `scale * first * max(reads)` in the cost of constraint `row`. A factor is a number, or a point with one
    number per option; none is below 0.
    """

    row: int
    scale: float
    first: float | tuple[int, tuple[float, ...]]
    reads: tuple[float | tuple[int, tuple[float, ...]], ...]

    @property
    def points(self) -> list[int]:
        """Return the indices of the points that the cost depends on."""
        return sorted({factor[0] for factor in (self.first, *self.reads) if isinstance(factor, tuple)})

    def value(self, picks: Sequence[int] | dict[int, int]) -> float:
        """Compute the cost when every point takes its option in `picks`."""
        first, *reads = (f[1][picks[f[0]]] if isinstance(f, tuple) else f for f in (self.first, *self.reads))
        return self.scale * first * max(reads)


@dataclass(frozen=True)
class Problem:
    """Minimize `sum degradations[i][picks[i]]` with `sum costs[row][i][picks[i]] + products <= limits[row]`.

    >>> problem = Problem([[0.9, 0.1], [0.2, 0.0]], [[[2, 8], [2, 8]]], [10])
    >>> problem.degradation([1, 0]), problem.totals([1, 0]), problem.keeps([1, 1])
    (0.30000000000000004, [10.0], False)
    """

    degradations: Row
    costs: Sequence[Row] = ()
    limits: Sequence[float] = ()
    products: Sequence[Product] = field(default=())

    def degradation(self, picks: Sequence[int]) -> float:
        """Compute the summed degradation when every point takes its option in `picks`."""
        return sum(degradations[pick] for degradations, pick in zip(self.degradations, picks, strict=True))

    def totals(self, picks: Sequence[int]) -> list[float]:
        """Compute the cost of `picks` under each constraint."""
        totals = [float(sum(cost[pick] for cost, pick in zip(row, picks, strict=True))) for row in self.costs]
        for product in self.products:
            totals[product.row] += product.value(picks)
        return totals

    def changed(self, totals: Sequence[float], picks: Sequence[int], point: int, option: int) -> list[float]:
        """Update the totals of some picks for another option at one point."""
        pick = picks[point]
        found = [t + row[point][option] - row[point][pick] for t, row in zip(totals, self.costs, strict=True)]
        after = {**dict(enumerate(picks)), point: option} if self._touching[point] else {}
        for product in self._touching[point]:
            found[product.row] += product.value(after) - product.value(picks)
        return found

    @functools.cached_property
    def _touching(self) -> list[list[Product]]:
        """Return the products that each point is part of."""
        return [
            [product for product in self.products if point in product.points] for point in range(len(self.degradations))
        ]

    def keeps(self, picks: Sequence[int]) -> bool:
        """Tell whether a choice keeps all limits."""
        return all(total <= limit for total, limit in zip(self.totals(picks), self.limits, strict=True))

    def least(self) -> list[float]:
        """Return the smallest cost under each constraint alone; with products, a lower bound."""
        found = [float(sum(map(min, row))) for row in self.costs]
        for product in self.products:
            first, *reads = (min(f[1]) if isinstance(f, tuple) else f for f in (product.first, *product.reads))
            found[product.row] += product.scale * first * max(reads)
        return found

    def separated(self) -> Problem:
        """Return the same problem with products of one point moved to its costs, and constant ones to the limits."""
        costs, limits, products = [[list(cost) for cost in row] for row in self.costs], list(self.limits), []
        for product in self.products:
            if not product.points:
                limits[product.row] -= product.value({})
            elif len(product.points) == 1:
                (point,) = product.points
                for option in range(len(self.degradations[point])):
                    costs[product.row][point][option] += product.value({point: option})
            else:
                products.append(product)
        return replace(self, costs=costs, limits=limits, products=products)

    def no_choice(self) -> NoChoiceError:
        """Return the error that names the smallest costs."""
        least = ", ".join(
            f"{c:.10g} for at most {limit:.10g}" for c, limit in zip(self.least(), self.limits, strict=True)
        )
        return NoChoiceError(f"no choice keeps all limits together; the smallest cost under each alone is: {least}")


def solve_ilp(problem: Problem, keeps: Keeps | None = None) -> list[int]:
    """Find the picks of least degradation by integer linear programming (HiGHS in scipy); exact, also with products.

    `keeps`: decides which picks are allowed, where rounding matters; the default is `problem.keeps`. Picks that only
    the solver's tolerance allows are cut off, one by one; after 20 of them the limits are lowered by about the
    tolerance, then by twice that, and so on. Raises ConfigError if no picks are allowed, or the solver gives up.

    >>> solve_ilp(Problem([[0.9, 0.1], [0.2, 0.0]], [[[2, 8], [2, 8]]], [10]))
    [1, 0]
    """
    model = _Program(problem.separated())
    keeps = keeps or problem.keeps
    found = model.solve(keeps)
    best = problem.degradation(found)
    slack = best - sum(map(min, problem.degradations))
    if 0.0 < slack < model.spread / 10:  # the solver's gap may hide a better choice: solve again with fewer options
        closer = _Program(problem.separated(), slack).solve(keeps)
        found = min(found, closer, key=problem.degradation)
    return found


def solve_greedy(problem: Problem, keeps: Keeps | None = None) -> list[int]:
    """Start at the best option of each point and repeat the change of least degradation per saving; ties: the first.

    Savings count up to the limits only, relative to them. This is the rule of `keep_budgets`, in plain numbers. Raises
    ConfigError where no step helps any more, which does not prove that no choice exists.

    >>> solve_greedy(Problem([[0.9, 0.1], [0.2, 0.0]], [[[2, 8], [2, 8]]], [10]))
    [1, 0]
    """
    keeps, problem = keeps or problem.keeps, problem.separated()
    limits = [limit - 1e-12 * abs(limit) for limit in problem.limits]

    def over(totals: Sequence[float]) -> float:
        return sum(max(t - limit, 0.0) / (abs(limit) or 1.0) for t, limit in zip(totals, limits, strict=True))

    picks = [
        min(range(len(h)), key=lambda o: (h[o], sum(row[p][o] for row in problem.costs)))
        for p, h in enumerate(problem.degradations)
    ]
    while not keeps(picks):
        totals = problem.totals(picks)
        before, best = over(totals), (math.inf, 0, 0)
        for point, degradations in enumerate(problem.degradations):
            for option in range(len(degradations)):
                saved = before - over(problem.changed(totals, picks, point, option))
                if saved > 1e-12:
                    best = min(best, ((degradations[option] - degradations[picks[point]]) / saved, point, option))
        if best[0] == math.inf:
            raise NoChoiceError(f"no step keeps all limits together; {problem.no_choice()}. Use solver='ilp'")
        picks[best[1]] = best[2]
    return picks


@dataclass(frozen=True)
class _Level:
    """One value of a factor, with its indicator: these entries plus a constant sum to 1 at this value, else to 0."""

    value: float
    entries: tuple[int, ...]
    constant: float = 0.0


class _Program:
    """Minimize c x with A x <= b and A x = b; x in {0, 1}, one entry per option; further entries, 0..1, for products.

    `slack`: options whose degradation exceeds the best of their point by more than this are left out.
    """

    def __init__(self, problem: Problem, slack: float = float("inf")) -> None:
        self.problem = problem
        self.starts = [0]
        for degradations in problem.degradations:
            self.starts.append(self.starts[-1] + len(degradations))
        excess = [
            degradation - min(degradations) for degradations in problem.degradations for degradation in degradations
        ]
        self.banned = [i for i, degradation in enumerate(excess) if degradation > slack * (1 + 1e-9)]
        self.spread = max(h for h in excess if h <= slack * (1 + 1e-9))
        self.objective = [h * SPREAD / (self.spread or 1.0) if h <= slack * (1 + 1e-9) else 0.0 for h in excess]
        self.n_options = len(self.objective)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        for point, degradations in enumerate(problem.degradations):
            self.rows.append(({self.starts[point] + o: 1.0 for o in range(len(degradations))}, 1.0, 1.0))
        self.costs: list[dict[int, float]] = [
            {self.starts[p] + o: c - min(cost) for p, cost in enumerate(row) for o, c in enumerate(cost)}
            for row in problem.costs
        ]
        self.limits = [limit - sum(map(min, row)) for limit, row in zip(problem.limits, problem.costs, strict=True)]
        for product in problem.products:
            self._add_product(product)

    def solve(self, keeps: Keeps) -> list[int]:
        """Return the best picks that are allowed. Raises ConfigError."""
        margin, cuts = 0.0, 0
        while True:
            picks = self._solve_once(margin)
            if keeps(picks):
                return picks
            cuts += 1
            ones = {self.starts[point] + pick: 1.0 for point, pick in enumerate(picks)}
            self.rows.append((ones, 0.0, len(picks) - 1.0))
            if cuts > N_CUTS:
                margin = max(MARGIN, 2.0 * margin)

    def _solve_once(self, margin: float) -> list[int]:
        optimize, sparse = require("scipy.optimize", "search"), require("scipy.sparse", "search")
        rows = list(self.rows)
        for row, limit in zip(self.costs, self.limits, strict=True):
            above = [c for c in row.values() if c > 0.0] or [1.0]
            unit = max(min(above), max(above) / SCALE)
            rows.append(({i: c / unit for i, c in row.items()}, -math.inf, limit / unit - margin))
        entries = [(r, i, c) for r, (row, _, _) in enumerate(rows) for i, c in row.items()]
        at_rows, at_columns, numbers = zip(*entries, strict=True)
        n = len(self.objective)
        matrix = sparse.csc_array((numbers, (at_rows, at_columns)), shape=(len(rows), n))
        banned = set(self.banned)
        result = optimize.milp(
            self.objective,
            integrality=[int(i < self.n_options) for i in range(n)],
            bounds=optimize.Bounds(0.0, [0.0 if i in banned else 1.0 for i in range(n)]),
            constraints=optimize.LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows]),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            if result.status == 2:
                raise self.problem.no_choice()
            raise ConfigError(f"the solver gave up: {result.message}; use solver='greedy'")
        return [int(result.x[a:b].argmax()) for a, b in itertools.pairwise(self.starts)]

    def _new(self) -> int:
        """Add an entry 0..1."""
        self.objective.append(0.0)
        return len(self.objective) - 1

    def _add_product(self, product: Product) -> None:
        """Add an entry for each pair of a value of the first factor and a largest value read; the levels are sums."""
        first = self._levels(product.first)
        widest = functools.reduce(self._larger, map(self._levels, product.reads))
        cost = self.costs[product.row]
        joint = [[self._new() for _ in widest] for _ in first]
        for levels, entries in ((first, joint), (widest, list(zip(*joint, strict=True)))):
            for level, own in zip(levels, entries, strict=True):
                row = dict.fromkeys(own, 1.0) | dict.fromkeys(level.entries, -1.0)
                self.rows.append((row, level.constant, level.constant))
        for level, own in zip(first, joint, strict=True):
            for other, entry in zip(widest, own, strict=True):
                cost[entry] = product.scale * level.value * other.value

    def _levels(self, factor: float | tuple[int, tuple[float, ...]]) -> list[_Level]:
        if not isinstance(factor, tuple):
            return [_Level(factor, (), 1.0)]
        point, numbers = factor
        start = self.starts[point]
        return [
            _Level(value, tuple(start + o for o, number in enumerate(numbers) if number == value))
            for value in sorted(set(numbers))
        ]

    def _larger(self, a: list[_Level], b: list[_Level]) -> list[_Level]:
        """Return the levels of the larger of two factors: "up to v" may be 1 only where it is 1 for both.

        The result may be larger than the true value, which only costs more; the optimal choice is the same.
        """
        low = max(a[0].value, b[0].value)
        values = sorted({low} | {level.value for level in (*a, *b) if level.value > low})
        levels = [_Level(value, (self._new(),)) for value in values]
        entries = [level.entries[0] for level in levels]
        self.rows.append((dict.fromkeys(entries, 1.0), 1.0, 1.0))
        for i, value in enumerate(values[:-1]):
            for side in (a, b):
                below = [level for level in side if level.value <= value]
                row = dict.fromkeys(entries[: i + 1], 1.0) | {e: -1.0 for level in below for e in level.entries}
                self.rows.append((row, -math.inf, sum(level.constant for level in below)))
        return levels
