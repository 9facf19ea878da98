"""Compute the cost of a choice in the measures of `Budget`, as numbers and as differentiable expectations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.graph.cost import FLOAT_BITS, SiteSize, observed, reads_of, site_sizes, stored_bytes, tied_weights
from torchquant.graph.finder import capture
from torchquant.graph.sites import SitePlan, make_for_slot
from torchquant.plan.quant_plan import QuantPlan
from torchquant.search.budget import Budget
from torchquant.search.space import Candidates, searched_slots

SearchPoint = tuple[str, str]
"""(site path, slot) where a choice is made."""
Selection = Mapping[SearchPoint, int]
"""SearchPoint -> index of the option chosen there."""
LatencyTable = Mapping[tuple[str, str], float]
"""(site path, weight spec) -> seconds of the layer."""


@dataclass(frozen=True)
class Variable:
    """One choice to make: its search point, its candidate specs, and the cost of each.

    `bits`, `bytes`, `seconds`: one number per option; bytes of weights or of activations. `elements`: how many elements
    the choice quantizes.
    """

    point: SearchPoint
    options: tuple[str, ...]
    bits: tuple[int, ...]
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    elements: int

    @property
    def is_weight(self) -> bool:
        """Whether stored weights are quantized with it."""
        return self.point[1] == "weight"


@dataclass(frozen=True)
class _Tied:
    """A weight that several search points share: its cost under each spec, and the index of each spec at each point."""

    bytes: Mapping[str | None, float]
    points: tuple[SearchPoint | str | None, ...]


@dataclass(frozen=True)
class _Product:
    """Multiply-adds of one site, and the source of its operands' bits: a search point, or fixed bits."""

    macs: int
    first: SearchPoint | int
    reads: tuple[SearchPoint | int, ...]


@checked
class CostModel:
    """The costs of every choice for a plan with candidates, on the example. Numbers equal those of `QuantPlan.cost`.

    `latency`: (site path, weight spec) -> seconds. Raises ConfigError.

    >>> from torchquant.search import search_rules
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> rules = search_rules([{"weight": ["affine:2", "affine:8"], "output": "affine:8"}])
    >>> costs = CostModel(net, QuantPlan.from_rules(rules, net), torch.zeros(1, 8))
    >>> costs.totals({("0", "weight"): 0, ("2", "weight"): 1})["bits"]
    3.2
    """

    def __init__(
        self, net: nn.Module, plan: QuantPlan, example_inputs: Any, latency: LatencyTable | None = None
    ) -> None:
        spaces = searched_slots(plan)
        if not spaces:
            raise ConfigError("the rules leave nothing to choose: give a slot a list of specs, or a spec with {n}")
        self.latency = latency
        self.variables: list[Variable] = []
        self.fixed = dict.fromkeys(("bytes", "act_bytes"), 0.0)
        self.products: list[_Product] = []
        chosen = {site.path: site for site in plan.sites}
        found = site_sizes(capture(net, example_inputs, plan.trace, plan.fuse), example_inputs)
        self.tied = self._tied(found, chosen, spaces)
        for size in found:
            path = size.site.path
            own = chosen.get(path, SitePlan(path))
            read = reads_of(size.site, own, chosen)
            unused = () if any(plan is own and name == "input" for plan, name, _ in read) else ("input",)
            for slot in ("weight", "input", "output", "bias"):
                if (path, slot) in spaces and slot not in unused:
                    elements = size.output_elements if slot == "output" else 0
                    self._add(spaces[path, slot], path, slot, size.weights, elements)
            if not isinstance(own.weight, Candidates):
                quantizers = [observed(own.make("weight", size.site.module), w, path) for w in size.weights]
                pairs = zip(size.weights, quantizers, strict=True)
                self.fixed["bytes"] += sum(sum(stored_bytes(w, q)) for w, q in pairs)
            if not isinstance(own.output, Candidates):
                self.fixed["act_bytes"] += -(-size.output_elements * _fixed_bits(own, "output", size.site.module) // 8)
            reads = tuple(_source(*where) for where in read)
            if size.site.is_layer:
                first = _source(own, "weight", size.site)
                self.products.append(_Product(size.macs.read, first, reads))
                if size.macs.inner or size.macs.floats:
                    self.products.append(_Product(size.macs.inner, first, (FLOAT_BITS,)))
                    self.products.append(_Product(size.macs.floats, FLOAT_BITS, (FLOAT_BITS,)))
            elif size.macs.read:
                pair = (*reads, reads[0])[:2]
                self.products.append(_Product(size.macs.read, pair[0], pair[1:]))
        self.points = [variable.point for variable in self.variables]
        self.by_point = {variable.point: variable for variable in self.variables}

    def _add(self, space: Candidates, path: str, slot: str, weights: Sequence[Tensor], elements: int) -> None:
        options = space.options(slot)
        made = [make_for_slot(spec, slot) for spec in options]
        bits = tuple(quantizer.n_bits for quantizer in made)
        if slot == "weight":
            sizes = [sum(_weight_bytes(spec, w, path) for w in weights) for spec in options]
            elements = sum(w.numel() for w in weights)
        else:
            sizes = [float(-(-elements * n // 8)) for n in bits]
        seconds = tuple(self._seconds(path, spec) for spec in options) if slot == "weight" else (0.0,) * len(bits)
        self.variables.append(Variable((path, slot), tuple(options), bits, tuple(sizes), seconds, elements))

    @staticmethod
    def _tied(
        sizes: Sequence[SiteSize], chosen: Mapping[str, SitePlan], spaces: Mapping[SearchPoint, Candidates]
    ) -> list[_Tied]:
        found = []
        for weight, shared in tied_weights(sizes, chosen):
            own = {path: chosen.get(path, SitePlan(path)).weight for path, _ in shared}
            fixed = {path: spec for path, spec in own.items() if spec is None or isinstance(spec, str)}
            free = {path: spaces[path, "weight"] for path in own if (path, "weight") in spaces}
            specs = {*fixed.values(), *(spec for space in free.values() for spec in space.options("weight"))}
            costs = {spec: _weight_bytes(spec, weight, shared[0][0]) for spec in specs}
            found.append(_Tied(costs, (*((path, "weight") for path in free), *fixed.values())))
        return found

    def _shared_bytes(self, share: Callable[[SearchPoint, str | None], Any]) -> Any:
        """Compute the bytes that tied weights count too often; `share`: the share of an option at a point, 0 to 1."""
        total: Any = 0.0
        for tied in self.tied:
            for spec, n_bytes in tied.bytes.items():
                parts = [share(p, spec) if isinstance(p, tuple) else float(p == spec) for p in tied.points]
                total = total + n_bytes * (sum(parts) - 1 + math.prod(1 - part for part in parts))
        return total

    def _seconds(self, path: str, spec: str) -> float:
        if self.latency is None:
            return 0.0
        if (path, spec) not in self.latency:
            raise ConfigError(f"the latency table has no entry for the site '{path}' with '{spec}'")
        return float(self.latency[path, spec])

    def totals(self, choice: Selection) -> dict[str, float]:
        """Compute every measure for one choice: point -> index of its option."""
        chosen = [(v, choice[v.point]) for v in self.variables]
        return self._measures(
            {v.point: float(v.bits[o]) for v, o in chosen},
            {v.point: v.bytes[o] for v, o in chosen},
            {v.point: v.seconds[o] for v, o in chosen},
            max,
            lambda point, spec: float(spec == self.by_point[point].options[choice[point]]),
        )

    def expected(self, shares: Mapping[SearchPoint, Tensor]) -> dict[str, Tensor]:
        """Compute the expected measures for shares (O,) of each point's options; float64, differentiable."""

        def mean(v: Variable, numbers: Sequence[float]) -> Tensor:
            given = shares[v.point].to(torch.float64)
            return (given * torch.tensor(numbers, dtype=torch.float64, device=given.device)).sum()

        def share(point: SearchPoint, spec: str | None) -> Any:
            options = self.by_point[point].options
            return shares[point].to(torch.float64)[options.index(spec)] if spec in options else 0.0

        found = self._measures(
            {v.point: mean(v, v.bits) for v in self.variables},
            {v.point: mean(v, v.bytes) for v in self.variables},
            {v.point: mean(v, v.seconds) for v in self.variables},
            lambda a, b: torch.maximum(*(torch.as_tensor(c, dtype=torch.float64) for c in (a, b))),
            share,
        )
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}

    def _measures(
        self,
        bits: Mapping[SearchPoint, Any],
        sizes: Mapping[SearchPoint, Any],
        seconds: Mapping[SearchPoint, Any],
        wider: Any,
        share: Callable[[SearchPoint, str | None], Any],
    ) -> dict[str, Any]:
        """Compute the measures from the bits, bytes and seconds of each point, as numbers or as tensors."""
        weights = [v for v in self.variables if v.is_weight]
        acts = [v for v in self.variables if not v.is_weight]

        def mean_bits(chosen: list[Variable]) -> Any:
            return sum(bits[v.point] * v.elements for v in chosen) / max(sum(v.elements for v in chosen), 1)

        def of(source: SearchPoint | int) -> Any:
            return source if isinstance(source, int) else bits[source]

        return {
            "bytes": sum(sizes[v.point] for v in weights) + self.fixed["bytes"] - self._shared_bytes(share),
            "bits": mean_bits(weights),
            "act_bytes": sum(sizes[v.point] for v in acts) + self.fixed["act_bytes"],
            "act_bits": mean_bits(acts),
            "bitops": sum(p.macs * of(p.first) * functools.reduce(wider, map(of, p.reads)) for p in self.products),
            "latency": sum(seconds[v.point] for v in weights),
        }

    def excess(self, choice: Selection, budgets: Sequence[Budget]) -> float:
        """Compute the relative excess of a choice over its budgets, added up; 0 if it keeps them all."""
        totals = self.totals(choice)
        return sum(max(totals[b.measure] / b.limit - 1.0, 0.0) for b in budgets)

    def check_feasible(self, budgets: Sequence[Budget]) -> None:
        """Raise ConfigError, with the smallest possible value, if a budget alone cannot be met."""
        for budget in budgets:
            counted = [v for v in self.variables if v.is_weight == (budget.measure == "bits") and v.elements]
            if budget.measure in ("bits", "act_bits") and not counted:
                what = "weights" if budget.measure == "bits" else "outputs"
                raise ConfigError(f"the budget {budget} is about searched {what}, but no {what} are searched")
            if budget.measure == "latency" and self.latency is None:
                raise ConfigError("a budget of latency needs a latency table: (site path, weight spec) -> seconds")
            least = self.totals(self.cheapest(budget.measure))[budget.measure]
            if least > budget.limit:
                raise ConfigError(
                    f"the budget {budget} cannot be met: the smallest value that these candidates allow is {least:g}"
                )

    def cheapest(self, measure: str = "bytes") -> dict[SearchPoint, int]:
        """Return the choice with the smallest value of a measure."""
        return {v.point: min(range(len(v.options)), key=lambda o: self._rank(v, o, measure)) for v in self.variables}

    @staticmethod
    def _rank(variable: Variable, option: int, measure: str) -> tuple[float, float]:
        first = {"bytes": variable.bytes, "act_bytes": variable.bytes, "latency": variable.seconds}
        numbers = first.get(measure, variable.bits)
        return float(numbers[option]), float(variable.bits[option])

    def plan_of(self, plan: QuantPlan, choice: Selection) -> QuantPlan:
        """Return the plan with the chosen specs instead of candidates; None for an input that needs no quantizer."""
        fields: dict[str, dict[str, str | None]] = {}
        for path, slot in searched_slots(plan):
            fields.setdefault(path, {})[slot] = None
        for point, option in choice.items():
            fields.setdefault(point[0], {})[point[1]] = self.by_point[point].options[option]
        sites = tuple(replace(site, **fields.get(site.path, {})) for site in plan.sites)  # type: ignore[arg-type]
        return replace(plan, sites=sites)


def name_of(point: SearchPoint) -> str:
    """Join path and slot in one name.

    >>> name_of(("layer1.0.conv1", "weight"))
    'layer1.0.conv1.weight'
    """
    return ".".join(part for part in point if part)


def _source(plan: SitePlan, slot: str, site: Any) -> SearchPoint | int:
    """Find the source of a slot's bits: a search point, or fixed bits."""
    if isinstance(getattr(plan, slot), Candidates):
        return (plan.path, slot)
    return _fixed_bits(plan, slot, site.module)


def _weight_bytes(spec: str | None, weight: Tensor, path: str) -> float:
    quantizer = observed(make_for_slot(spec, "weight") if spec else None, weight, path)
    return float(sum(stored_bytes(weight, quantizer)))


def _fixed_bits(plan: SitePlan, slot: str, module: nn.Module | None) -> int:
    if getattr(plan, slot) == "share":
        return FLOAT_BITS
    quantizer = plan.make(slot, module)
    return FLOAT_BITS if quantizer is None else quantizer.n_bits
