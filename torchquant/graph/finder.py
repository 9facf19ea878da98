"""Find the sites of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.graph.called import ATTENTION, SOFTMAX, CalledProduct, Event, Sequences, sequences
from torchquant.graph.calls import pattern_of
from torchquant.graph.copies import copy_model
from torchquant.graph.graph_sites import GraphSites
from torchquant.graph.operators import OPERATORS
from torchquant.graph.ops import is_norm, operator_of_module
from torchquant.graph.recording import real_values, recorded_calls
from torchquant.graph.sites import (
    NORM_WHY,
    Captured,
    Found,
    Region,
    Site,
    SiteInput,
    Unquantized,
    Way,
    has_layers,
    joined,
    layer_slots,
    layer_types,
    looked_after,
    why_other,
)
from torchquant.graph.trace import NotTraceable, pattern_without_example, renamed, traced_variants
from torchquant.qmodule.patterns import plain_type
from torchquant.qmodule.state import QModule

Patterns = Mapping[str, tuple[Any, ...] | str]
"""Path of a module -> how it is called, or the reason why its forward is not traced."""
BETWEEN = "operators between its layers: "
RAW_WHY = "a weight that no layer owns: a forward uses it directly"
VARYING_WHY = "its calls multiply values in different ways, so that no quantizer belongs to a product"


@checked
def capture(
    model: nn.Module,
    example_inputs: Any = None,
    trace: bool | str = True,
    fuse: bool | str = True,
    patterns: Patterns | None = None,
    products: Mapping[str, tuple[CalledProduct, ...]] | None = None,
) -> Captured:
    """Find every site of the model where a quantizer can be placed. The model is not changed or run; a copy is.

    Where torch.fx can trace a forward, batch norms and activations are fused into the layers before them and operators
    become sites. Where it cannot, or where a graph would lose a side effect of the forward (an attribute it writes, a
    random number it draws in Python), the layers are sites one by one, and `floats` gives the reason.

    `example_inputs`: a tensor, a tuple or a dictionary of arguments; with it, forwards are traced as they are called,
    and only values that are real tensors become sites, and the products of values in forwards that are not traced are
    sites too. `trace=False`: forwards are not traced, so that only layers, one by one, and products are sites;
    "modules": only layers and modules without children are. `fuse`: "bn" fuses batch norms but no
    activations, False fuses nothing; without trace only batch norms can be fused. `patterns`, `products`: those of a
    capture with an example, in its place. Raises ConfigError for a model that is already quantized or that fails on the
    example.

    >>> [site.path for site in capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).sites]
    ['0', '2']
    """
    if any(isinstance(module, QModule) for module in model.modules()):
        raise ConfigError("the model has QModules already; capture the float model, or plan.revert(model) first")
    if trace not in (True, False, "modules"):
        raise ConfigError(f"trace must be True, False or 'modules', got {trace!r}")
    if fuse not in (True, False, "bn"):
        raise ConfigError(f"fuse must be True, False or 'bn', got {fuse!r}")
    twin, run = copy_model(model), copy_model(model) if example_inputs is not None else None
    known, counts = dict[str, tuple[Any, ...] | str](patterns or {}), dict[str, int]()
    if run is not None:
        calls = recorded_calls(run, example_inputs)
        known, counts = {path: pattern_of(values) for path, values in calls.values.items()}, calls.counts
    finder = Finder(twin, trace, fuse, known)
    finder.look_into("", twin)
    if run is not None and finder.regions:
        finder.keep_real(run, example_inputs)
    if trace != "modules":
        found = Sequences(dict(products or {}), {}, []) if run is None else finder.products_in(calls.events)
        counts.update(finder.find_called(found, counts))
    finder.tell_of_raw_weights()
    return replace(finder.captured(model), counts=counts)


class Finder(Found):
    """Goes through a throw-away copy of a model and collects sites, float parts and regions."""

    def __init__(self, model: nn.Module, trace: bool | str, fuse: bool | str, patterns: Patterns) -> None:
        super().__init__()
        self.model, self.trace, self.fuse, self.patterns = model, trace, fuse, patterns
        self.products: dict[str, tuple[CalledProduct, ...]] = {}
        self.norms = _norms_after(model, patterns) if trace is not True and fuse == "bn" else {}

    def captured(self, model: nn.Module) -> Captured:
        """Return the findings, with the modules of `model` in place of those of the copy."""

        def site_of(site: Site) -> Site:
            return site if site.module is None else replace(site, module=model.get_submodule(site.path))

        regions = {
            path: replace(
                region,
                module=model.get_submodule(path),
                ways=tuple(replace(way, sites=tuple(map(site_of, way.sites))) for way in region.ways),
            )
            for path, region in self.regions.items()
        }
        sites = tuple(map(site_of, self.sites.values()))
        return Captured(model, sites, tuple(self.floats), regions, self.trace, self.fuse, self.products)

    def look_into(self, path: str, module: nn.Module, is_read: bool = True) -> None:
        """Collect the sites of a module, from its graphs if it can be traced. `is_read`: as in `Site`."""
        if module in self.seen:
            return
        self.seen.add(module)
        if layer_slots(module):
            fused = (self.norms[module],) if module in self.norms else ()
            types, fields = layer_types(module), layer_slots(module)
            self.sites[path] = Site(path, types, fields, module, fused, region=path, is_read=is_read)
            return
        try:
            if self.trace is not True:
                raise NotTraceable("")
            region = self._followed(path, module)
        except NotTraceable as reason:
            self._look_at_children(path, module, str(reason))
        else:
            self.regions[path] = region
            self._find_in(region, is_read)

    def _followed(self, path: str, module: nn.Module) -> Region:
        pattern = self.patterns.get(path) or pattern_without_example(module)
        if isinstance(pattern, str):
            raise NotTraceable(pattern)
        names: dict[Any, str] = {}
        traced = traced_variants(module, pattern)
        ways = tuple(Way(replace(each, graph=renamed(each.graph, names))) for each in traced)
        return Region(path, module, ways, "", pattern, names)

    def _find_in(self, region: Region, is_read: bool) -> None:
        """Collect the sites of all ways through a forward; parts that the ways fuse differently are not fused."""
        limits: dict[str, int] = {}
        while True:
            start = dict(self.sites), list(self.floats), dict(self.regions), set(self.seen)
            elsewhere = frozenset(self.seen)
            found = [
                GraphSites(self, region, way.graph, self.look_into, elsewhere, limits, self.fuse, is_read).find()
                for way in region.ways
            ]
            clash = _differently_fused(found)
            if clash is None:
                break
            limits.update([clash])
            self.sites, self.floats, self.regions, self.seen = start
            region.op_paths.clear()
        ways = tuple(replace(way, sites=sites) for way, sites in zip(region.ways, found, strict=True))
        self.regions[region.path] = replace(region, ways=ways)

    def _look_at_children(self, path: str, module: nn.Module, reason: str) -> None:
        self.regions[path] = Region(path, module, (), reason)
        has_sites = len(self.sites)
        for name, child in module.named_children():
            below = joined(path, name)
            operator = operator_of_module(child)
            types = operator.types if operator is not None and operator.role == "computes" else ()
            is_leaf = self.trace == "modules" and next(child.children(), None) is None and not layer_slots(child)
            if (types or is_leaf) and child not in self.seen:
                self.seen.add(child)
                if below not in {taken for taken, _ in self.norms.values()}:
                    types = (*types, plain_type(child).__name__)
                    self.sites[below] = Site(below, types, ("input", "output"), child, region=path)
            elif has_layers(child):
                self.look_into(below, child, is_read=not layer_slots(child))  # layers quantize their inputs
            elif is_norm(child) and child not in self.seen:
                self.seen.add(child)
                self.floats.append(Unquantized(below, type(child).__name__, NORM_WHY))
        is_container = type(module).forward is nn.Module.forward
        if reason and not is_container and len(self.sites) > has_sites:
            self.floats.append(Unquantized(path, type(module).__name__, BETWEEN + reason))

    @torch.no_grad()
    def keep_real(self, run: nn.Module, example_inputs: Any) -> None:
        """Drop the sites and reads whose values are not real numbers when `run`, a copy, runs on the example."""
        real = real_values(run, self.regions, example_inputs)

        def is_real(region: str, node: str) -> bool:
            return real.get((region, node), True)

        def kept(sites: Mapping[str, Site]) -> dict[str, Site]:
            return {
                path: replace(site, reads=tuple(read for read in site.reads if is_real(site.region, read.node)))
                for path, site in sites.items()
                if not site.nodes or site.is_layer or is_real(site.region, site.nodes[-1])
            }

        self.sites = kept(self.sites)
        for path, region in self.regions.items():
            ways = tuple(replace(w, sites=tuple(kept({s.path: s for s in w.sites}).values())) for w in region.ways)
            self.regions[path] = replace(region, ways=ways)

    def products_in(self, events: Sequence[Event]) -> Sequences:
        """Find what the forwards that are not traced call, by what the model called on the example."""
        others = looked_after(self.sites.values(), self.regions.values())
        layers = {path for path, site in self.sites.items() if site.is_layer}

        def can_be_watched(stack: tuple[tuple[str, int], ...]) -> bool:
            path = stack[-1][0]
            module = self.model.get_submodule(path)
            is_free = path not in others and not any(above in layers for above, _ in stack)
            return is_free and "forward" not in vars(module) and not isinstance(module, torch.jit.ScriptModule)

        owners = {event.stack[-1][0] for event in events if event.is_product and can_be_watched(event.stack)}
        return sequences(events, owners, others)

    def find_called(self, found: Sequences, counts: Mapping[str, int]) -> dict[str, int]:
        """Collect the products in forwards that are not traced as sites; return how often each runs in a forward."""
        for path in found.varying:
            self.floats.append(Unquantized(path, type(self.model.get_submodule(path)).__name__, VARYING_WHY))
        runs: dict[str, int] = {}
        for path, calls in found.products.items():
            owner = self.model.get_submodule(path)
            self.regions.setdefault(path, Region(path, owner))
            for i, call in enumerate(calls):
                if not call.operands:
                    continue
                operator, taken = OPERATORS[call.operator], {*self.sites, *runs}
                names = (operator.path if n == 0 else f"{operator.path}_{n}" for n in count())
                name = next(n for n in names if not hasattr(owner, n) and joined(path, n) not in taken)
                is_of_softmax = call.operator == ATTENTION or any(made >= 0 for made in call.operands)
                fields = ("input", "probabilities") if is_of_softmax else ("input",)
                reads = tuple(
                    SiteInput(str(at), (), SOFTMAX if made >= 0 else "") for at, made in enumerate(call.operands)
                )
                site = Site(joined(path, name), operator.types, fields, None, (), reads, path, (), False, i)
                self.sites = _put_after(self.sites, site, path)
                runs[site.path] = counts.get(path, 1) * found.repeats.get(path, 1)
        self.products = found.products
        return {path: n for path, n in runs.items() if n > 1}

    def tell_of_raw_weights(self) -> None:
        """List the weights that belong to no site, such as tables and kernels that a forward uses directly."""
        told = {left.path: left.type for left in self.floats if not left.why.startswith(BETWEEN)}
        layers = [site.module for site in self.sites.values() if site.module is not None]
        owned = {id(p) for module in layers for p in module.parameters()}
        for path, module in self.model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                is_told = told.get(path) == type(module).__name__
                if weight.ndim > 1 and id(weight) not in owned and not is_told:
                    kind = f"{type(module).__name__}.{name}"
                    self.floats.append(Unquantized(joined(path, name), kind, why_other(module) or RAW_WHY))


def _put_after(sites: Mapping[str, Site], site: Site, owner: str) -> dict[str, Site]:
    """Put a site behind the last one inside its owner, as it runs about there."""
    paths = list(sites)
    inside = [i for i, path in enumerate(paths) if path.startswith(f"{owner}." if owner else "")]
    at = inside[-1] + 1 if inside else len(paths)
    ordered = [*paths[:at], site.path, *paths[at:]]
    return {path: site if path == site.path else sites[path] for path in ordered}


def _differently_fused(found: list[tuple[Site, ...]]) -> tuple[str, int] | None:
    """Find a site that the ways of a forward fuse differently, and how many fused parts they share."""
    fused: dict[str, tuple[tuple[str, str], ...]] = {}
    for sites in found:
        for site in sites:
            known = fused.setdefault(site.path, site.fused)
            if known != site.fused:
                same = [a == b for a, b in zip(known, site.fused, strict=False)]
                return site.path, (*same, False).index(False)
    return None


def _norms_after(model: nn.Module, patterns: Patterns) -> dict[nn.Module, tuple[str, str]]:
    """Find layer -> (path, class) of the batch norm that follows it and nothing else, as far as a graph shows."""
    finder = Finder(model, True, "bn", patterns)
    finder.look_into("", model)
    return {
        site.module: site.fused[0]
        for site in finder.sites.values()
        if site.module is not None and site.fused and site.is_layer
    }
