"""Compute the Pareto front of cost against degradation."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchquant._arguments import checked, number
from torchquant._figures import new_figure
from torchquant._files import write_json
from torchquant._renamed import renamed_attribute
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError, require
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.search.allocation.assignment import Allocation, Allocator, Degradations
from torchquant.search.allocation.sensitivities import Sensitivity
from torchquant.search.budget import MEASURES, Budget
from torchquant.search.cost import LatencyTable

LABELS = {
    "bytes": "weights, bytes",
    "bits": "mean bits of the searched weights",
    "act_bytes": "activations, bytes",
    "act_bits": "mean bits of the searched activations",
    "bitops": "bit operations",
    "latency": "latency, s",
}
DEGRADATION_LABELS = {
    "mse": "predicted mean squared error of the output",
    "kl": "predicted KL divergence, nats",
    "loss": "predicted increase of the loss",
    "hessian": "predicted degradation (Tr(H)/n times squared error)",
    "fisher": "predicted increase of the loss (Fisher)",
}
FORMATS = ("png", "svg")


@dataclass(frozen=True)
class ParetoPoint:
    """One allocation of the front; `measured` is the result of `evaluate` for its plan, None without it."""

    cost: float
    predicted: float
    allocation: Allocation
    measured: float | None = None


@dataclass(frozen=True)
class Pareto(ShownAsTables):
    """Allocations that no other one beats in both cost and predicted degradation, cheapest first. Prints as a table."""

    measure: str
    points: tuple[ParetoPoint, ...]
    degradation: str = "predicted degradation"
    evaluated: str = "measured"

    harm = renamed_attribute("harm", "degradation")

    def table(self) -> str:
        """Show one line per point of the front."""
        header = [self.measure, "predicted degradation", self.evaluated]
        rows = [
            [f"{p.cost:g}", f"{p.predicted:.4g}", "-" if p.measured is None else f"{p.measured:.4g}"]
            for p in self.points
        ]
        return text_table(header, rows)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: cost, degradation, measured value, all totals and the choice of each point."""
        points = [
            {
                "cost": point.cost,
                "predicted": point.predicted,
                "measured": point.measured,
                "totals": dict(point.allocation.totals),
                "choice": [
                    {"site": site, "field": name, "spec": spec} for (site, name), spec in point.allocation.specs.items()
                ],
            }
            for point in self.points
        ]
        return {"measure": self.measure, "harm": self.degradation, "evaluated": self.evaluated, "points": points}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the front as JSON."""
        return write_json(Path(path), self.to_dict())

    def figure(self, file_format: str = "png") -> bytes:
        """Draw the front as "png" or "svg": degradation over cost, and measured values on the right axis.

        Needs matplotlib. Raises ConfigError.
        """
        if file_format not in FORMATS:
            raise ConfigError(f"the file format of a figure must be {' or '.join(FORMATS)}, got '{file_format}'")
        matplotlib = require("matplotlib", "report")
        figure = new_figure(6.4, 4.0, layout="constrained")
        axes = figure.add_subplot()
        costs = [point.cost for point in self.points]
        axes.plot(costs, [point.predicted for point in self.points], marker="o", markersize=4, color="#33658a")
        axes.set_yscale("log" if all(point.predicted > 0.0 for point in self.points) else "linear")
        axes.set_xlabel(LABELS[self.measure], fontsize=9)
        axes.set_ylabel(self.degradation, fontsize=9, color="#33658a")
        axes.grid(linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        measured = [(p.cost, p.measured) for p in self.points if p.measured is not None]
        if measured:
            right = axes.twinx()
            right.plot(*zip(*measured, strict=True), marker="s", markersize=4, color="#d1495b")
            right.set_ylabel(self.evaluated, fontsize=9, color="#d1495b")
            right.spines[["top"]].set_visible(False)
        buffer = io.BytesIO()
        metadata = {"Software": None} if file_format == "png" else {"Date": None}
        with matplotlib.rc_context({"svg.hashsalt": "torchquant"}):
            figure.savefig(buffer, format=file_format, dpi=100, metadata=metadata)
        return buffer.getvalue()


@checked
def pareto(
    net: nn.Module,
    rules: Rules | QuantPlan,
    example_inputs: Any,
    sensitivity: Degradations,
    measure: str = "bytes",
    points: int = 10,
    evaluate: Callable[[QuantPlan], float] | None = None,
    evaluated: str = "measured",
    solver: str = "ilp",
    latency: LatencyTable | None = None,
    min_bits: int = 2,
    max_bits: int = 8,
) -> Pareto:
    """Allocate for `points` budgets of one measure, from the smallest possible to the cost of the least degradation.

    Points that another point beats in both cost and degradation are left out, so fewer may remain. `evaluate(plan)`:
    loss or accuracy of the model under a plan, measured for every point; `evaluated` is its name with the unit. The
    other arguments are as in `allocate`. Raises ConfigError.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> degradations = {("0", "weight"): [0.9, 0.1], ("2", "weight"): [0.2, 0.0]}
    >>> rules = [{"weight": ["affine:2", "affine:8"]}]
    >>> front = pareto(net, rules, torch.zeros(1, 8), degradations, "bits", solver="dp")
    >>> [(point.cost, round(point.predicted, 3)) for point in front.points]
    [(2.0, 1.1), (3.2, 0.9), (6.8, 0.3), (8.0, 0.1)]
    """
    if measure not in MEASURES:
        raise ConfigError(f"measure must be one of {', '.join(MEASURES)}, got '{measure}'")
    if points < 2:
        raise ConfigError(f"points must be at least 2, got {points}")
    allocator = Allocator(net, rules, example_inputs, sensitivity, latency, min_bits, max_bits)
    costs = allocator.costs
    least, most = (costs.totals(choice)[measure] for choice in (costs.cheapest(measure), allocator.best()))
    if least <= 0.0:
        raise ConfigError(f"'{measure}' is 0 for some choice; a front needs a measure that is always above 0")
    limits = [least + (most - least) * i / (points - 1) for i in range(points - 1)]
    found = [allocator.solve([Budget(measure, limit)], solver) for limit in [*limits, most]]
    front: list[ParetoPoint] = []
    for allocation in sorted(found, key=lambda a: (a.totals[measure], a.predicted)):
        if not front or allocation.predicted < front[-1].predicted:
            measured = None if evaluate is None else number(evaluate(allocation.plan), "the result of evaluate")
            front.append(ParetoPoint(allocation.totals[measure], allocation.predicted, allocation, measured))
    label = DEGRADATION_LABELS[sensitivity.method] if isinstance(sensitivity, Sensitivity) else "predicted degradation"
    return Pareto(measure, tuple(front), label, evaluated)
