"""Allocation: exact solvers against brute force and the golden, budgets that hold, fronts, latency tables."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import DATA
from torchquant import QuantPlan
from torchquant.errors import ConfigError
from torchquant.search import Budget, CostModel, search_rules
from torchquant.search.allocation.assignment import Allocator, allocate, plain_problem
from torchquant.search.allocation.dynamic import solve_dp
from torchquant.search.allocation.fronts import pareto
from torchquant.search.allocation.latency import measure_latency, read_latency, write_latency
from torchquant.search.allocation.sensitivities import Sensitivity, sensitivity
from torchquant.search.allocation.solvers import NoChoiceError, Problem, Product, solve_greedy, solve_ilp
from torchquant.search.learning.budget_repair import keep_budgets
from torchquant.search.space import searched_slots

GOLDEN = json.loads((DATA.parent / "golden.json").read_text(encoding="utf-8"))["golden"]["ilp_toy"]
EXACT = [solve_ilp, solve_dp]
WIDTHS = ["affine:2/channel", "affine:4/channel", "affine:8/channel"]


def toy(budget: float) -> Problem:
    costs = [[n * b for b in GOLDEN["bits"]] for n in GOLDEN["n_params"]]
    return Problem(GOLDEN["omega"], [costs], [budget])


@pytest.mark.parametrize("solve", EXACT)
def test_the_golden(solve: Any) -> None:
    problem = toy(GOLDEN["budget_bits"])
    picks = solve(problem)
    assert [GOLDEN["bits"][pick] for pick in picks] == GOLDEN["optimum_bits"] == [8, 2, 8]
    assert problem.degradation(picks) == pytest.approx(GOLDEN["optimum_omega"], abs=1e-12)


def choices(problem: Problem) -> Any:
    return itertools.product(*(range(len(degradations)) for degradations in problem.degradations))


def brute_force(problem: Problem) -> float | None:
    return min((problem.degradation(picks) for picks in choices(problem) if problem.keeps(picks)), default=None)


def random_problem(rng: random.Random, coupled: bool) -> Problem:
    """Up to 5 points, 3 constraints; limits that some choice just meets, or just misses."""
    sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 5))]
    whole = rng.random() < 0.5

    def number() -> float:
        return float(rng.randint(0, 12)) if whole else rng.random()

    scale = 10.0 ** rng.uniform(-6, 6)
    degradations = [[scale * (number() - 0.2) for _ in range(n)] for n in sizes]
    costs = [[[number() for _ in range(n)] for n in sizes] for _ in range(rng.randint(1, 3))]
    factors = [(i, tuple(float(rng.randint(1, 5)) for _ in range(n))) for i, n in enumerate(sizes)]

    def factor() -> Any:
        return rng.choice(factors) if rng.random() < 0.75 else float(rng.randint(1, 5))

    products = [
        Product(rng.randrange(len(costs)), rng.random(), factor(), tuple(factor() for _ in range(rng.randint(1, 3))))
        for _ in range(rng.randint(1, 3) if coupled else 0)
    ]
    problem = Problem(degradations, costs, [0.0] * len(costs), products)
    totals = problem.totals([rng.randrange(n) for n in sizes])
    return Problem(degradations, costs, [total * rng.choice([1, 1, 0.8, 1.2]) for total in totals], products)


@pytest.mark.parametrize(("solve", "coupled"), [(solve_ilp, True), (solve_ilp, False), (solve_dp, False)])
def test_exact_solvers_are_brute_force(solve: Any, coupled: bool) -> None:
    rng = random.Random(0)
    outcomes, n_proposed, n_solved = set(), 0, 0
    for _ in range(120):
        problem = random_problem(rng, coupled)
        best = brute_force(problem)
        outcomes.add(best is None)
        if best is None:
            with pytest.raises(
                NoChoiceError, match="no choice keeps all limits together; the smallest cost under each alone"
            ):
                solve(problem)
            continue
        proposed: list[Any] = []

        def keeps(picks: Any, proposed: list[Any] = proposed, problem: Problem = problem) -> bool:
            proposed.append(picks)
            return problem.keeps(picks)

        picks = solve(problem, keeps)
        n_proposed, n_solved = n_proposed + len(proposed), n_solved + 1
        assert problem.keeps(picks)
        assert problem.degradation(picks) == pytest.approx(best, rel=1e-9, abs=1e-15)
    assert outcomes == {True, False}
    assert n_proposed < 1.5 * n_solved, "what is proposed should be right at once, but for rounding"


@pytest.mark.parametrize("n_points", [30, 60])
def test_both_exact_solvers_find_the_same_for_many_places(n_points: int) -> None:
    rng = random.Random(n_points)
    costs = [[[float(bits * n) for bits in (2, 3, 4, 6, 8)] for n in (rng.randint(10, 999) for _ in range(n_points))]]
    degradations = [[rng.lognormvariate(0, 2) * 4.0**-bits for bits in (2, 3, 4, 6, 8)] for _ in range(n_points)]
    problem = Problem(degradations, costs, [1.6 * sum(cost[0] for cost in costs[0])])
    found = [problem.degradation(solve(problem)) for solve in EXACT]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert problem.degradation(solve_greedy(problem)) >= found[0]


def test_the_largest_of_what_is_read_is_proposed_at_once() -> None:
    proposed: list[Any] = []
    two = tuple((point, (1.0, 8.0)) for point in (0, 1))
    problem = Problem([[1.0, 0.0], [1.0, 0.0]], [[[0, 0], [0, 0]]], [4.0], [Product(0, 1.0, 1.0, two)])
    assert solve_ilp(problem, lambda picks: proposed.append(picks) or problem.keeps(picks)) == [0, 0]  # type: ignore[func-returns-value]
    assert proposed[0] == [0, 0]


def test_small_degradations_beside_a_huge_one() -> None:
    rng = random.Random(0)
    degradations = [[1e9, 0.0], *([rng.random(), 0.0] for _ in range(20))]
    costs = [[[0, 5], *([0, rng.randint(1, 9)] for _ in range(20))]]
    problem = Problem(degradations, costs, [50])
    assert problem.degradation(solve_ilp(problem)) == pytest.approx(problem.degradation(solve_dp(problem)), rel=1e-9)


def test_greedy_never_exceeds_the_limits() -> None:
    rng = random.Random(1)
    solved = 0
    for _ in range(300):
        problem = random_problem(rng, rng.random() < 0.5)
        best = brute_force(problem)
        try:
            picks = solve_greedy(problem)
        except NoChoiceError:
            continue
        solved += 1
        assert problem.keeps(picks)
        assert best is not None
        assert problem.degradation(picks) >= best - 1e-9 * abs(best)
    assert solved > 100


@pytest.mark.parametrize("solve", EXACT)
def test_a_tolerance_does_not_break_a_limit(solve: Any) -> None:
    rng = random.Random(2)
    large = Problem([[rng.random(), 0.0] for _ in range(30)], [[[1e7, 1e7 + 1]] * 30], [30e7 + 15])
    worst = sorted(degradations[0] for degradations in large.degradations)[:15]
    assert large.degradation(solve(large)) == pytest.approx(sum(worst), rel=1e-12)
    hidden = Problem([[1.0, 0.0], [0.5, 0.0]], [[[0.0, 1.0], [0.0, 1e-10]]], [1.0])
    assert solve(hidden) == [1, 0]
    small = [[rng.randint(1, 50), rng.randint(50, 100)] for _ in range(20)]
    mixed = Problem([[9.0, 0.0], *([rng.random(), 0.0] for _ in range(20))], [[[0, 1e9], *small]], [1e9 + 900])
    picks = solve(mixed)
    assert mixed.keeps(picks)
    assert mixed.degradation(picks) == pytest.approx(mixed.degradation(({solve_ilp, solve_dp} - {solve}).pop()(mixed)))


def test_dynamic_programming_says_what_it_cannot() -> None:
    coupled = Problem([[0, 1], [0, 1]], [[[0, 0], [0, 0]]], [9], [Product(0, 1.0, (0, (2.0, 1.0)), ((1, (2.0, 1.0)),))])
    with pytest.raises(ConfigError, match="costs that are sums.*Use solver='ilp'"):
        solve_dp(coupled)
    single = Problem(
        coupled.degradations, coupled.costs, [3], [Product(0, 1.0, (0, (2.0, 1.0)), (2.0, (0, (2.0, 1.0))))]
    )
    assert solve_dp(single) == solve_ilp(single) == [1, 0]
    rng = random.Random(0)
    many = Problem(*([[[rng.random() for _ in range(4)] for _ in range(12)]]), [], [])
    costs = [[[rng.random() for _ in range(4)] for _ in range(12)] for _ in range(3)]
    with pytest.raises(ConfigError, match="more than 3 states"):
        solve_dp(Problem(many.degradations, costs, [6.0] * 3), max_states=3)


class Paths(nn.Module):
    """Two branches that are joined by a product of their features: three searched factors in one cost."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 5)
        self.join = nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


def random_degradations(plan: QuantPlan, seed: int = 0) -> dict[tuple[str, str], list[float]]:
    rng = random.Random(seed)
    return {
        point: sorted((rng.random() for _ in space.options(point[1])), reverse=True)
        for point, space in searched_slots(plan).items()
    }


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    ).eval()


CONV_RULES = [
    {"weight": WIDTHS, "output": ["affine:4", "affine:8"], "fold_bn": True},
    {"position": "first", "input": "affine:8"},
    {"position": "last", "output": None, "weight": "affine:8/channel"},
]


@pytest.mark.parametrize("model", [Paths, conv_net])
def test_bit_operations_of_two_choices_are_exact(model: Any) -> None:
    net = model()
    x = torch.randn(2, 6) if model is Paths else torch.randn(1, 1, 8, 8)
    rules = [{"weight": WIDTHS, "output": ["affine:2", "affine:8"]}] if model is Paths else CONV_RULES
    plan = QuantPlan.from_rules(search_rules(rules), net, x)
    degradations = random_degradations(plan)
    allocator = Allocator(net, plan, x, degradations)
    costs = allocator.costs
    every = [
        dict(zip(costs.points, picks, strict=True))
        for picks in itertools.product(*(range(len(v.options)) for v in costs.variables))
    ]
    totals = [costs.totals(choice) for choice in every]
    sums = [sum(degradations[point][pick] for point, pick in choice.items()) for choice in every]
    for share in (0.35, 0.6):
        limits = {
            name: share * max(t[name] for t in totals) + (1 - share) * min(t[name] for t in totals)
            for name in ("bytes", "bitops", "act_bits")
        }
        budgets = [Budget(name, limit) for name, limit in limits.items()]
        best = min(s for s, t in zip(sums, totals, strict=True) if all(t[n] <= limit for n, limit in limits.items()))
        problem = plain_problem(costs, budgets, allocator.degradations)
        for choice, total, degradation in zip(every, totals, sums, strict=True):
            picks = list(choice.values())
            assert problem.keeps(picks) == all(total[name] <= limit for name, limit in limits.items())
            assert problem.degradation(picks) == pytest.approx(degradation)
        found = allocator.solve(budgets, "ilp")
        assert found.predicted == pytest.approx(best)
        for solver in ("ilp", "greedy"):
            assert costs.excess(allocator.solve(budgets, solver).choice, budgets) == 0.0
        with pytest.raises(ConfigError, match="Use solver='ilp'"):
            allocator.solve(budgets, "dp")


@pytest.mark.parametrize("solver", ["ilp", "dp", "greedy"])
def test_the_plan_costs_what_the_budgets_allow(solver: str) -> None:
    net, x = conv_net(), torch.randn(4, 1, 8, 8)
    rules = [CONV_RULES[0] | {"output": "affine:8"}, *CONV_RULES[1:]]
    batches = [(x, torch.arange(4))]
    measured = sensitivity(net, rules, x[:1], batches, "kl")
    budgets = "bytes<=660B, bitops<=0.6M, bits<=4.5"
    found = allocate(net, rules, x[:1], budgets, measured, solver)
    cost = found.plan.cost(net, x[:1])
    assert cost.weight_bytes == found.totals["bytes"] <= 660
    assert cost.bit_ops == found.totals["bitops"] <= 0.6e6
    assert found.predicted == pytest.approx(sum(measured.degradations[p][o] for p, o in found.choice.items()))
    weights = {size.path: size for size in cost}
    numel = {path: net.get_submodule(path).weight.numel() for path in ("0", "3")}
    assert sum(weights[p].weight_bits * n for p, n in numel.items()) / sum(numel.values()) <= 4.5
    assert QuantPlan.from_dict(found.plan.to_dict()) == found.plan
    table = str(found)
    assert all(spec in table for spec in found.specs.values())
    assert "bytes" in table.splitlines()[-6]
    found.plan.apply(net)(x)


def test_exact_solvers_agree_and_greedy_is_the_rule_of_repair() -> None:
    net = nn.Sequential(*(nn.Linear(rows, 8) for rows in (8, 8, 8, 8, 8)))
    x = torch.randn(1, 8)
    plan = QuantPlan.from_rules(search_rules([{"weight": "affine:{n}"}]), net, x)
    for seed in range(5):
        allocator = Allocator(net, plan, x, random_degradations(plan, seed))
        for limit in (2.0, 3.3, 5.0, 7.9):
            budgets = [Budget("bits", limit)]
            ilp, dp, greedy = (allocator.solve(budgets, solver) for solver in ("ilp", "dp", "greedy"))
            assert ilp.predicted == pytest.approx(dp.predicted, rel=1e-12)
            assert greedy.predicted >= ilp.predicted - 1e-12
            assert greedy.totals["bits"] <= limit
            scores = random_degradations(plan, seed)
            assert greedy.choice == keep_budgets(allocator.costs, budgets, scores, allocator.best())


def test_what_is_refused_and_how() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 8)
    rules = [{"weight": WIDTHS}]
    degradations = {("0", "weight"): [3.0, 2.0, 1.0]}
    for budget, given, solver, words in [
        (
            "bits<=1.9",
            degradations,
            "ilp",
            "bits<=1.9 cannot be met: the smallest value that these candidates allow is 2",
        ),
        ("", degradations, "ilp", "an allocation needs at least one budget"),
        ("bits<=4", degradations, "simplex", "solver must be one of ilp, dp, greedy, got 'simplex'"),
        ("latency<=1ms", degradations, "ilp", "needs a latency table"),
        ("bits<=4", {}, "ilp", "no entry for '0', weight"),
        ("bits<=4", {("0", "weight"): [1.0]}, "ilp", "has 3 options, the sensitivity 1"),
        ("bits<=4", {("0", "weight"): [1.0, 2.0, float("nan")]}, "ilp", "degradations must be finite"),
        (
            "bits<=4",
            Sensitivity("mse", degradations, {("0", "weight"): ("a", "b", "c")}),
            "ilp",
            "was measured for a, b, c",
        ),
    ]:
        with pytest.raises(ConfigError, match=words):
            allocate(net, rules, x, budget, given, solver)


@pytest.mark.parametrize("solver", ["ilp", "dp", "greedy"])
def test_budgets_that_only_clash_together(solver: str) -> None:
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 8)
    table = {("0", spec): seconds for spec, seconds in zip(WIDTHS, (3.0, 2.0, 1.0), strict=True)}
    with pytest.raises(
        ConfigError, match=rf"{solver} finds no choice .*bits<=4 \(smallest 2\), latency<=1 \(smallest 1\)"
    ):
        allocate(net, [{"weight": WIDTHS}], x, "bits<=4,latency<=1s", {("0", "weight"): [1, 2, 3]}, solver, table)
    found = allocate(net, [{"weight": WIDTHS}], x, "bits<=4,latency<=2s", {("0", "weight"): [1, 2, 3]}, solver, table)
    assert found.specs == {("0", "weight"): WIDTHS[1]}


@pytest.mark.parametrize("measure", ["bytes", "bitops"])
def test_a_front_has_no_point_that_another_beats(measure: str, tmp_path: Path) -> None:
    net, x = conv_net(), torch.randn(1, 1, 8, 8)
    plan = QuantPlan.from_rules(search_rules(CONV_RULES), net, x)
    seen: list[QuantPlan] = []

    def evaluate(plan: QuantPlan) -> float:
        seen.append(plan)
        return 0.5 + len(seen) / 100

    front = pareto(net, plan, x, random_degradations(plan), measure, 6, evaluate, "accuracy, share")
    costs, degradations = [p.cost for p in front.points], [p.predicted for p in front.points]
    assert len(costs) > 3
    assert costs == sorted(set(costs))
    assert degradations == sorted(set(degradations), reverse=True)
    model = CostModel(net, plan, x)
    assert costs[0] == model.totals(model.cheapest(measure))[measure]
    assert degradations[-1] == pytest.approx(sum(min(h) for h in random_degradations(plan).values()))
    assert seen == [point.allocation.plan for point in front.points]
    assert [point.measured for point in front.points] == [0.5 + (i + 1) / 100 for i in range(len(seen))]
    data = json.loads(front.save(tmp_path / "front.json").read_text(encoding="utf-8"))
    assert [point["cost"] for point in data["points"]] == costs
    assert len(str(front).splitlines()) == len(costs) + 2
    assert front.figure().startswith(b"\x89PNG")
    assert front.figure("svg") == front.figure("svg")
    assert b"<svg" in front.figure("svg")


def test_fronts_that_cannot_be() -> None:
    net, x, degradations = nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 8), {("0", "weight"): [3.0, 2.0, 1.0]}
    for kwargs, words in [
        ({"measure": "watts"}, "measure must be one of bytes"),
        ({"points": 1}, "points must be at least 2, got 1"),
        ({"measure": "latency"}, "a front needs a measure that is always above 0"),
    ]:
        with pytest.raises(ConfigError, match=words):
            pareto(net, [{"weight": WIDTHS}], x, degradations, **kwargs)
    with pytest.raises(ConfigError, match="png or svg, got 'gif'"):
        pareto(net, [{"weight": WIDTHS}], x, degradations).figure("gif")


def test_latency_is_measured_one_place_at_a_time(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 8)
    rules = [{"weight": WIDTHS, "output": ["affine:4", "affine:8"]}]
    plan = QuantPlan.from_rules(search_rules(rules), net, x)
    seconds = {("0", WIDTHS[0]): 3.0, ("0", WIDTHS[1]): 1.0, ("0", WIDTHS[2]): 2.0}
    seconds |= {("2", spec): 0.5 * value for (_, spec), value in seconds.items()}
    plans: list[QuantPlan] = []

    def time_plan(plan: QuantPlan) -> float:
        plans.append(plan)
        return 0.25 + sum(seconds[site.path, site.weight] for site in plan.sites)  # type: ignore[index]

    table = measure_latency(net, plan, time_plan)
    assert len(plans) == 1 + 2 * 2
    assert {site.output for p in plans for site in p.sites} == {"affine:4"}
    for first, second in itertools.product(WIDTHS, WIDTHS):
        assert table["0", first] + table["2", second] == pytest.approx(
            0.25 + seconds["0", first] + seconds["2", second]
        )
    path = write_latency(tmp_path / "latency.json", table)
    assert set(json.loads(path.read_text(encoding="utf-8"))[0]) == {"site", "spec", "seconds"}
    assert read_latency(path) == table
    found = allocate(net, plan, x, "latency<=3.0s", random_degradations(plan), latency=read_latency(path))
    assert found.totals["latency"] <= 3.0


def test_latency_tables_that_are_none(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="has candidates for none"):
        measure_latency(net, [{"output": ["affine:4", "affine:8"]}], lambda plan: 1.0)
    with pytest.raises(ConfigError, match="seconds above 0, got 0.0"):
        measure_latency(net, [{"weight": WIDTHS}], lambda plan: 0.0)
    entry = '{"site": "0", "spec": "affine:2", "seconds": 1}'
    for text, words in [
        ("{}", "must be a list"),
        ("nothing", "is not JSON"),
        ('[{"site": "0"}]', "entry 1: expected site, spec and seconds"),
        (f"[{entry}, {entry}]", "entry 2: seconds must be finite, and each site and spec must occur once"),
    ]:
        (tmp_path / "table.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            read_latency(tmp_path / "table.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_latency(tmp_path / "nothing.json")
