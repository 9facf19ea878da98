"""Rule sets with one choice changed at a time: what each observer, weight rule, fold and granularity gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.harness import compare
from benchmarks.real.networks import Batches, Real
from benchmarks.real.page import COST, GOALS
from benchmarks.real.peers.ours import SETS, calibrated
from torchquant import QModuleState, QuantSpec, qmodule_state
from torchquant.plan.rules import RULE_SETS
from torchquant.quantizers import find_scheme
from torchquant.range_observers import OBSERVERS, RangeObserver

WEIGHT_RULES = ("minmax", "mse")
"""Observers of weights."""
FACTORS: dict[str, tuple[Any, ...]] = {
    "observer": tuple(OBSERVERS),
    "weight rule": WEIGHT_RULES,
    "batch norm": ("folded", "own"),
    "granularity": ("tensor", "channel"),
}
"""What is chosen -> what there is to choose."""
TIMED = dict.fromkeys(("w8a8", "w8a8-transformer"), ("observer", "weight rule"))
"""Rule set -> the factors whose calibration is timed; at other widths it is the same work."""


@dataclass(frozen=True)
class Choice:
    """A rule set with one factor set by hand, everything else as it is."""

    rules: str
    factor: str
    value: str

    @property
    def name(self) -> str:
        return f"{self.rules} {self.factor}={self.value}"

    @property
    def cost(self) -> str:
        """The name of the cell with the time of its calibration."""
        return self.name + COST

    @property
    def is_timed(self) -> bool:
        return self.factor in TIMED.get(self.rules, ())

    def made(self) -> list[dict[str, Any]]:
        """The rules of the set with the choice written in."""
        return [self._changed(rule) for rule in RULE_SETS[self.rules]]

    def _changed(self, rule: dict[str, Any]) -> dict[str, Any]:
        found = dict(rule)
        if self.factor == "batch norm":
            if "fold_bn" in found:
                found["fold_bn"] = self.value == "folded"
            return found
        fields = ("input", "output") if self.factor == "observer" else ("weight",)
        for field in fields:
            if isinstance(found.get(field), str) and ":" in found[field]:
                spec = QuantSpec.parse(found[field])
                if self.factor == "granularity":
                    granularity = "" if self.value == "tensor" else self.value
                    found[field] = str(replace(spec, granularity=granularity, group=None))
                elif spec.granularity != "token":  # which observes nothing
                    found[field] = str(_observed_by(spec, self.value))
        return found


def _observed_by(spec: QuantSpec, observer: str) -> QuantSpec:
    """The spec with another observer, without the options that the former one took."""
    scheme, _ = find_scheme(spec.scheme)
    own = {*inspect.signature(scheme).parameters, *scheme.short_names}
    options = tuple((key, value) for key, value in spec.options if key in own)
    return replace(spec, options=(*options, ("observer", observer)))


def choices(network: str) -> Iterator[Choice]:
    """What is tried on the network of this name."""
    for rules in (rules for rules, networks in SETS.items() if not networks or network in networks):
        for factor, values in FACTORS.items():
            for value in values:
                yield Choice(rules, factor, value)


def timed_observers() -> Iterator[Choice]:
    """The observers whose calibration has a goal, each in the rule set that observes the most."""
    for observer in GOALS:
        yield Choice("w8a8", "observer", observer)


@torch.no_grad()
def calibration_cost(network: Real, choice: Choice, rounds: int) -> dict[str, Any]:
    """Time of a calibration, its searches included, over that of the float model on the same batches.

    Every calibration is a first one: what the observers have seen is forgotten before it.
    """
    model = calibrated(network, choice.made())

    def calibrate() -> None:
        for module in model.modules():
            if isinstance(module, RangeObserver):
                module.reset()
        with qmodule_state(model, QModuleState.CALIBRATION):
            run_all(model, network.calibration)
        for module in model.modules():
            if isinstance(module, RangeObserver) and module.is_observed:
                module.get_ranges()

    compared = compare(lambda: run_all(network.model, network.calibration), {"calibration": calibrate}, rounds)
    ratio = compared.ratio("calibration")
    return {"cost": ratio.median, "minima": ratio.minima, "valid": compared.is_valid}


def run_all(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(*batch)
