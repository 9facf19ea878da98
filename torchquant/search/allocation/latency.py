"""Measure the latency of each layer with each option, by timing the whole model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from torchquant._arguments import checked, number
from torchquant._files import read_json, write_json
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.sites import make_for_slot
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.search.allocation.calibrated_supernet import searched_plan
from torchquant.search.cost import LatencyTable, SearchPoint
from torchquant.search.space import searched_slots


@checked
def measure_latency(
    net: nn.Module, plan: Rules | QuantPlan, time_plan: Callable[[QuantPlan], float]
) -> dict[tuple[str, str], float]:
    """Make the table that a budget of latency needs: (site path, weight spec) -> seconds.

    `plan`: a plan with `Candidates`, or rules. `time_plan(plan)`: seconds of the whole model under a plan without
    candidates, measured on the target device. It is called once with the option of fewest bits everywhere, then once
    for each other option of each weight, with the other weights unchanged. An entry is an equal share of the first
    time, plus the time that the option adds. This assumes that the differences add up, and an entry can be below 0.
    Raises ConfigError.

    >>> from torchquant.search import search_rules
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> plan = QuantPlan.from_rules(search_rules([{"weight": ["affine:2", "affine:8"]}]), net)
    >>> seconds = {"affine:2": 1.0, "affine:8": 3.0}
    >>> table = measure_latency(net, plan, lambda plan: sum(seconds[site.weight] for site in plan.sites))
    >>> table["0", "affine:2"], table["1", "affine:8"]
    (1.0, 3.0)
    """
    searched = searched_plan(net, plan, None)
    spaces = searched_slots(searched)
    options = {point: space.options(point[1]) for point, space in spaces.items()}
    bits = {point: [make_for_slot(spec, point[1]).n_bits for spec in specs] for point, specs in options.items()}
    base = {point: specs[bits[point].index(min(bits[point]))] for point, specs in options.items()}
    weights = [point for point in options if point[1] == "weight"]
    if not weights:
        raise ConfigError("a latency table needs candidates for weights, but the plan has candidates for none")
    first = _seconds(time_plan, searched, base)
    table = {}
    for point in weights:
        for spec in options[point]:
            added = 0.0 if spec == base[point] else _seconds(time_plan, searched, {**base, point: spec}) - first
            table[point[0], spec] = first / len(weights) + added
    return table


def _seconds(time_plan: Callable[[QuantPlan], float], plan: QuantPlan, chosen: Mapping[SearchPoint, str]) -> float:
    fields: dict[str, dict[str, str]] = {}
    for (path, slot), spec in chosen.items():
        fields.setdefault(path, {})[slot] = spec
    sites = tuple(replace(site, **fields.get(site.path, {})) for site in plan.sites)  # type: ignore[arg-type]
    found = number(time_plan(replace(plan, sites=sites)), "the result of time_plan")
    if not (math.isfinite(found) and found > 0.0):
        raise ConfigError(f"time_plan must return seconds above 0, got {found}")
    return found


@checked
def write_latency(path: str | os.PathLike[str], table: LatencyTable) -> Path:
    """Write a table as JSON: a list of {site, spec, seconds}."""
    entries = [{"site": site, "spec": spec, "seconds": seconds} for (site, spec), seconds in table.items()]
    return write_json(Path(path), entries)


@checked
def read_latency(path: str | os.PathLike[str]) -> dict[tuple[str, str], float]:
    """Read a table that `write_latency` wrote, or one written by hand. Raises ConfigError."""
    data = read_json(path)
    if not isinstance(data, list):
        raise ConfigError(f"{path} is not a latency table: it must be a list of {{site, spec, seconds}}")
    table: dict[tuple[str, str], float] = {}
    for i, entry in enumerate(data):
        try:
            site, spec, seconds = entry["site"], entry["spec"], float(entry["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, entry {i + 1}: expected site, spec and seconds, got {shown(entry)}") from error
        if not math.isfinite(seconds) or (site, spec) in table:
            raise ConfigError(f"{path}, entry {i + 1}: seconds must be finite, and each site and spec must occur once")
        table[site, spec] = seconds
    return table
