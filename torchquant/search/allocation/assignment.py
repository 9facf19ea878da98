"""Allocate mixed precision by sensitivity: the options with the smallest total degradation within budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant._renamed import renamed_attribute
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.search.allocation.calibrated_supernet import searched_plan
from torchquant.search.allocation.dynamic import solve_dp
from torchquant.search.allocation.sensitivities import Sensitivity
from torchquant.search.allocation.solvers import NoChoiceError, Problem, Product, solve_greedy, solve_ilp
from torchquant.search.budget import Budget
from torchquant.search.cost import CostModel, LatencyTable, SearchPoint, Variable

SOLVERS = {
    "ilp": "integer linear programming, exact; needs scipy",
    "dp": "dynamic programming, exact; for costs that are sums over search points",
    "greedy": "from the best option everywhere, repeats the step with the least degradation for its saving",
}
Degradations = Sensitivity | Mapping[SearchPoint, Sequence[float]]
"""A result of `sensitivity`, or point -> a number for each option: larger is worse."""


@dataclass(frozen=True)
class Allocation(ShownAsTables):
    """A choice for every search point, within the budgets. Prints as a table.

    `plan`: with spec strings, ready for `apply`, `save` and `quantize`. `choice`: point -> index of its option.
    `totals`: every measure of `MEASURES`. `predicted`: the sum of the degradations.
    """

    plan: QuantPlan
    choice: Mapping[SearchPoint, int]
    specs: Mapping[SearchPoint, str]
    degradations: Mapping[SearchPoint, float]
    totals: Mapping[str, float]
    predicted: float
    budgets: tuple[Budget, ...]
    solver: str

    harms = renamed_attribute("harms", "degradations")

    def table(self) -> str:
        """Show every point with its option and degradation, then the costs beside the budgets."""
        rows = [[*point, spec, f"{self.degradations[point]:.4g}"] for point, spec in self.specs.items()]
        rows.append(["(all)", "", "", f"{self.predicted:.4g}"])
        limits = {budget.measure: f"{budget.limit:g}" for budget in self.budgets}
        costs = [[name, f"{total:g}", limits.get(name, "-")] for name, total in self.totals.items()]
        points = text_table(["site", "slot", "option", "degradation"], rows)
        return f"{points}\n\n{text_table(['measure', 'cost', 'at most'], costs)}"

    def __str__(self) -> str:
        return self.table()


@checked
def allocate(
    net: nn.Module,
    rules: Rules | QuantPlan,
    example_inputs: Any,
    budget: str | Budget | Sequence[str | Budget],
    sensitivity: Degradations,
    solver: str = "ilp",
    latency: LatencyTable | None = None,
    min_bits: int = 2,
    max_bits: int = 8,
) -> Allocation:
    """Choose the options with the smallest sum of degradations that keep every budget.

    `rules`: as `search_rules` reads them, or a plan with `Candidates`. `budget`: "bytes<=40kB", or several,
    "bytes<=40kB,bitops<=2G" (`MEASURES`); "latency" needs the table of `measure_latency`. `solver` (`SOLVERS`):
    "ilp" and "dp" are exact, "greedy" is not. HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680) allocates by "ilp".

    The budgets hold exactly: `CostModel.excess` is 0. The sum assumes that the degradations of single points add up;
    measure the resulting plan. Raises ConfigError, with the smallest possible value where a budget cannot be kept.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> degradations = {("0", "weight"): [0.9, 0.1], ("2", "weight"): [0.2, 0.0]}
    >>> rules = [{"weight": ["affine:2", "affine:8"]}]
    >>> found = allocate(net, rules, torch.zeros(1, 8), "bits<=7", degradations, solver="dp")
    >>> found.specs, found.totals["bits"]
    ({('0', 'weight'): 'affine:8', ('2', 'weight'): 'affine:2'}, 6.8)
    """
    allocator = Allocator(net, rules, example_inputs, sensitivity, latency, min_bits, max_bits)
    return allocator.solve(Budget.parse(budget), solver)


class Allocator:
    """The costs and degradations of one model, to solve for one budget after another. Raises ConfigError.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> allocator = Allocator(net, [{"weight": ["affine:2", "affine:8"]}], torch.zeros(1, 8), {("0", "weight"): [1, 0]})
    >>> [allocator.solve(Budget.parse(text), "dp").totals["bits"] for text in ("bits<=8", "bits<=7.9")]
    [8.0, 2.0]
    """

    def __init__(
        self,
        net: nn.Module,
        rules: Rules | QuantPlan,
        example_inputs: Any,
        sensitivity: Degradations,
        latency: LatencyTable | None = None,
        min_bits: int = 2,
        max_bits: int = 8,
    ) -> None:
        self.plan = searched_plan(net, rules, example_inputs, min_bits, max_bits)
        self.costs = CostModel(net, self.plan, example_inputs, latency)
        self.degradations = [_checked_degradations(variable, sensitivity) for variable in self.costs.variables]

    def best(self) -> dict[SearchPoint, int]:
        """Return the option with the least degradation everywhere; among equal ones, that with the fewest bits."""
        return {
            v.point: min(range(len(degradations)), key=lambda o: (degradations[o], v.bits[o]))
            for v, degradations in zip(self.costs.variables, self.degradations, strict=True)
        }

    def solve(self, budgets: Sequence[Budget], solver: str = "ilp") -> Allocation:
        """Solve the allocation for these budgets. Raises ConfigError."""
        if solver not in SOLVERS:
            raise ConfigError(
                f"solver must be one of {', '.join(SOLVERS)}, got '{solver}'.{did_you_mean(solver, SOLVERS)}"
            )
        if not budgets:
            raise ConfigError("an allocation needs at least one budget, such as 'bytes<=40kB'")
        self.costs.check_feasible(budgets)

        def keeps(picks: Sequence[int]) -> bool:
            return self.costs.excess(self._choice(picks), budgets) == 0.0

        try:
            solve = {"ilp": solve_ilp, "dp": solve_dp, "greedy": solve_greedy}[solver]
            picks = solve(plain_problem(self.costs, budgets, self.degradations), keeps)
        except NoChoiceError:
            least = {b.measure: self.costs.totals(self.costs.cheapest(b.measure))[b.measure] for b in budgets}
            words = ", ".join(f"{b} (smallest {least[b.measure]:.10g})" for b in budgets)
            hint = " Use solver='ilp'" if solver == "greedy" else ""
            raise ConfigError(f"{solver} finds no choice that keeps all budgets together: {words}.{hint}") from None
        return self.allocation(self._choice(picks), budgets, solver)

    def _choice(self, picks: Sequence[int]) -> dict[SearchPoint, int]:
        return dict(zip(self.costs.points, picks, strict=True))

    def allocation(self, choice: Mapping[SearchPoint, int], budgets: Sequence[Budget], solver: str) -> Allocation:
        """Make the allocation of a choice: its plan, specs, degradations and costs."""
        variables = self.costs.variables
        degradations = {v.point: h[choice[v.point]] for v, h in zip(variables, self.degradations, strict=True)}
        return Allocation(
            self.costs.plan_of(self.plan, choice),
            dict(choice),
            {v.point: v.options[choice[v.point]] for v in variables},
            degradations,
            self.costs.totals(choice),
            sum(degradations.values()),
            tuple(budgets),
            solver,
        )


def _checked_degradations(variable: Variable, given: Degradations) -> tuple[float, ...]:
    """Return the degradations of one point. Raises ConfigError if they were measured for other options."""
    degradations = given.degradations if isinstance(given, Sensitivity) else given
    site, name = variable.point
    if variable.point not in degradations:
        raise ConfigError(f"the sensitivity has no entry for '{site}', {name}; it was measured for other rules")
    found = tuple(map(float, degradations[variable.point]))
    if len(found) != len(variable.options):
        raise ConfigError(f"'{site}', {name} has {len(variable.options)} options, the sensitivity {len(found)} numbers")
    if isinstance(given, Sensitivity) and given.options[variable.point] != variable.options:
        raise ConfigError(
            f"'{site}', {name} has the options {', '.join(variable.options)}, but the sensitivity was measured for "
            f"{', '.join(given.options[variable.point])}"
        )
    if not all(abs(degradation) < float("inf") for degradation in found):
        raise ConfigError(f"'{site}', {name}: degradations must be finite, got {found}")
    return found


def plain_problem(costs: CostModel, budgets: Sequence[Budget], degradations: Sequence[Sequence[float]]) -> Problem:
    """Make the problem in plain numbers: one constraint per budget, in whole bits, bytes and bit operations."""
    rows, limits, products = [], [], []
    indices = {point: index for index, point in enumerate(costs.points)}
    for row, budget in enumerate(budgets):
        rows.append([_numbers(variable, budget.measure) for variable in costs.variables])
        limit = budget.limit - costs.fixed.get(budget.measure, 0.0)
        if budget.measure in ("bits", "act_bits"):
            counted = [v.elements for v in costs.variables if v.is_weight == (budget.measure == "bits")]
            limit *= max(sum(counted), 1)
        limits.append(limit)
        if budget.measure == "bitops":
            for product in costs.products:
                factors = [
                    float(source) if isinstance(source, int) else (indices[source], _bits(costs.by_point[source]))
                    for source in (product.first, *product.reads)
                ]
                products.append(Product(row, float(product.macs), factors[0], tuple(factors[1:])))
    return Problem(degradations, rows, limits, products)


def _bits(variable: Variable) -> tuple[float, ...]:
    return tuple(map(float, variable.bits))


def _numbers(variable: Variable, measure: str) -> tuple[float, ...]:
    """Return what each option adds to a measure that is a sum over points; 0 for bit operations."""
    counted = variable.is_weight != (measure in ("act_bytes", "act_bits"))
    if not counted or measure == "bitops":
        return (0.0,) * len(variable.options)
    if measure == "latency":
        return variable.seconds
    return (
        variable.bytes
        if measure in ("bytes", "act_bytes")
        else tuple(float(n * variable.elements) for n in variable.bits)
    )
