"""Compile NNI's `config_list`, in both spellings, to a QuantPlan and the quantizers that a plan has no slot for."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from torchquant._shown import shown
from torchquant.compat.nni import named_targets
from torchquant.compat.nni.config import LayerConfig, Target, check_lists, read_2
from torchquant.compat.nni.config_3 import Read3, is_3, read_3
from torchquant.errors import ConfigError
from torchquant.graph import Captured, Site, SitePlan, capture
from torchquant.graph.sites import make_for_slot
from torchquant.plan import QuantPlan
from torchquant.plan.quant_plan import what_is_at
from torchquant.qmodule.weights import weight_names
from torchquant.quantizers import Quantizer

MakeSpec = Callable[[str, Target], "str | None"]
"""Returns the spec string for a slot ("weight", "bias", "input", "output") and the settings of a tensor there."""


@dataclass(frozen=True)
class Compiled:
    """A config list as a plan for a captured model, with the settings that a plan cannot express."""

    plan: QuantPlan
    captured: Captured = field(repr=False)
    layers: dict[str, LayerConfig]
    others: tuple[tuple[str, str, str], ...] = ()
    """(path, target, spec) of the tensors that are no slot."""

    def apply(self) -> nn.Module:
        """Put the quantizers into the captured model itself; return it, or what takes its place."""
        model = self.plan.apply_to(self.captured)
        for path, name, spec in self.others:
            named_targets.put(model.get_submodule(path), path, name, make_for_slot(spec, slot_of(name)))
        return model

    def revert(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """Return the float model with the current weights, a copy or the model itself."""
        reverted = self.plan.revert(model, inplace)
        named_targets.remove_all(reverted)
        return reverted


def slot_of(target: str) -> str:
    """Return the slot like which a target is treated."""
    if target in ("input", "output") or target.startswith((named_targets.INPUT, named_targets.OUTPUT)):
        return "input" if "input" in target.split("_") else "output"
    return "bias" if target == "bias" else "weight"


def compile_config(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], spec: MakeSpec, fuse_bn: bool = False
) -> Compiled:
    """Compile a config list to a plan for a model; `spec(slot, target)` returns the spec of a tensor's quantizer.

    Each module is a site of its own, as in NNI. `fuse_bn`: fold all batch norms; without it only those in the
    `fuse_names` of 3.0 are. Unknown names and types warn, as in NNI; any other error raises ConfigError.
    """
    if not isinstance(config_list, Sequence) or isinstance(config_list, str):
        raise ConfigError(f"config_list must be a list of dictionaries, got {shown(config_list)}")
    for i, entry in enumerate(config_list):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"config_list[{i}] must be a dictionary, got {shown(entry)}")
        check_lists(f"config_list[{i}]", entry)
    entries = [dict(entry) for entry in config_list]
    modern = [is_3(entry) for entry in entries]
    if any(modern) and not all(new or "quant_types" not in entry for new, entry in zip(modern, entries, strict=True)):
        raise ConfigError(
            "config_list mixes the spelling of NNI 2.x (quant_types) and of NNI 3.0 (target_names); use one of them"
        )
    captured = capture(model, trace="modules", fuse="bn" if fuse_bn else False)
    if any(modern):
        read = read_3(entries, model, captured.sites)
        captured = _with_fused(captured, read.fused)
    else:
        read = Read3(read_2(entries, captured.sites))
    plans, others, known = [], [], {site.path for site in captured.sites}
    takers = {part: layer for layer, parts in read.fused.items() for part, _ in parts}
    for path, config in read.layers.items():
        if path in takers:
            warnings.warn(
                f"'{path}' is fused into '{takers[path]}' and quantizes nothing itself; what it returns is the output "
                f"of '{takers[path]}'",
                stacklevel=4,
            )
        elif path not in known:
            others += [(path, name, _required(spec(slot_of(name), t))) for name, t in config.targets.items()]
    for site in captured.sites:
        if site.path in read.layers:
            fields, rest = _fields(site, read.layers[site.path], spec)
            plans.append(SitePlan(site.path, **fields, fold_bn="running" if site.batch_norm else False))
            others += rest
    plan = QuantPlan(
        tuple(plans),
        captured.floats,
        "modules",
        captured.fuse,
        {site.path: what_is_at(site) for site in captured.sites},
    )
    layers = {path: config for path, config in read.layers.items() if path not in takers}
    return Compiled(plan, captured, layers, tuple(others))


def _with_fused(captured: Captured, fused: Mapping[str, tuple[tuple[str, str], ...]]) -> Captured:
    """Fuse what is listed: the layers take their parts in, which are no sites of their own."""
    parts = {path for each in fused.values() for path, _ in each}
    sites = tuple(
        replace(site, fused=fused.get(site.path, site.fused)) for site in captured.sites if site.path not in parts
    )
    return replace(captured, sites=sites)


def _required(spec: str | None) -> str:
    assert spec is not None
    return spec


def _fields(site: Site, config: LayerConfig, spec: MakeSpec) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Return the slots of a site with their specs, and the other targets."""
    weights = [] if site.module is None else weight_names(site.module)
    fields: dict[str, Any] = {}
    rest, each = [], {}
    for name, target in config.targets.items():
        made = spec(slot_of(name), target)
        if name in site.fields:
            fields[name] = made
        elif name in weights:
            each[name] = made
        elif name in ("weight", "input", "output", "bias"):
            raise ConfigError(
                f"module '{site.path}' ({site.types[-1]}) has no {name} to quantize; it has {', '.join(site.fields)}"
            )
        else:
            rest.append((site.path, name, _required(made)))
    if each:
        fields["weight"] = _EachWeight([each.get(name, fields.get("weight")) for name in weights])
    return fields, rest


class _EachWeight:
    """Makes the quantizers of the weights of a module in their order, each by its own spec."""

    def __init__(self, specs: Sequence[Any]) -> None:
        self.specs: Iterator[Any] = itertools.cycle(specs)

    def __call__(self, module: nn.Module) -> Quantizer | None:
        spec = next(self.specs)
        return None if spec is None else make_for_slot(spec, "weight")
