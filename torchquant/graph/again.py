"""Trace a forward of a quantized model again, because it takes a path that was not traced."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn

from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.calls import pattern_of
from torchquant.graph.copies import copy_model
from torchquant.graph.edit import GraphEditor
from torchquant.graph.finder import Finder
from torchquant.graph.graph_sites import GraphSites
from torchquant.graph.sites import Region, Site, Way
from torchquant.graph.trace import renamed, traced_variants
from torchquant.graph.traced import Followed, Held, TracedModule, Variant, follows_again, remove
from torchquant.graph.tracer import NotTraceable
from torchquant.graph.watched import WatchedModule, unwatch
from torchquant.qmodule import QModule
from torchquant.qmodule.holder import Holder

REMEDY = "Quantize the float model as it is now: quantize(plan.revert(model), rules, example_inputs)"


@follows_again
def follow_again(module: TracedModule, followed: Followed, values: tuple[Any, ...]) -> Variant:
    """Trace one more variant of the forward, for this call and the current attributes, with the existing quantizers.

    Operators that the forward did not run before stay float, with a warning. Raises ConfigError if this variant cannot
    be traced, or if a layer no longer matches its QModule.
    """
    changed = followed.changed()
    why = changed or _why(followed, values)
    twin, pattern = float_twin(module, followed), pattern_of(values)
    try:
        (traced,) = traced_variants(twin, pattern, (None,), through_hooks=True)
    except NotTraceable as reason:
        raise ConfigError(
            f"{type(module).__name__} takes another path than when it was quantized ({why}), which cannot be traced: "
            f"{reason}. {REMEDY}"
        ) from reason
    graph = renamed(traced.graph, followed.node_names)
    region = Region("", twin, (Way(traced),), "", pattern, followed.node_names, followed.op_paths)
    finder = Finder(twin, True, True, {})
    sites = _fused_alike(finder, region, graph, followed)
    editor, new = GraphEditor(graph), []
    quantized = {path for path in followed.fused if _has_output(module, path)}
    for site in sites:
        specs = followed.specs_of(site.path)
        editor.quantize_inputs(site, specs, quantized, lambda node, spec, slot: followed.inputs.get((node, spec)))
        if site.path in followed.fused or _moved_from(module, site, followed):
            _check(module, site, followed, why)
            editor.call(site, site.path)
        elif site.path not in followed.known:
            new.append(site.path)
    if new:
        warnings.warn(
            f"{type(module).__name__} takes another path than when it was quantized ({why}); operators new in it "
            f"stay float: {', '.join(new)}. {REMEDY}",
            stacklevel=2,
        )
    guards = [Held(None if g.is_global else _real(module, g.where), g.where, g.name, g.value) for g in traced.guards]
    variant = Variant(pattern, guards, graph)
    if changed:  # the older variants call modules that no longer exist
        followed.variants.clear()
    followed.variants.insert(0, variant)
    followed.seal(module, traced.inlined)
    return variant


def _why(followed: Followed, values: tuple[Any, ...]) -> str:
    broken = [variant.broken() for variant in followed.variants]
    held = next((held for held in broken if held is not None), None)
    return f"another call: {shown(pattern_of(values))}" if held is None else f"{held} has changed"


def _fused_alike(finder: Finder, region: Region, graph: fx.Graph, followed: Followed) -> tuple[Site, ...]:
    """Find the sites of the graph, with no more fused into each than its QModule has."""
    limits = {path: len(fused) for path, fused in followed.fused.items()}
    return GraphSites(finder, region, graph, finder.look_into, limits=limits).find()


def _check(module: nn.Module, site: Site, followed: Followed, why: str) -> None:
    """Raise ConfigError if a QModule computes something else than its site."""
    present = module.get_submodule(site.path)
    if not isinstance(present, QModule):
        raise ConfigError(f"'{site.path}' was replaced by a {type(present).__name__} without quantizers. {REMEDY}")
    fused = followed.fused[_moved_from(module, site, followed) or site.path]
    if [kind for _, kind in site.fused] != [kind for _, kind in fused]:
        taken = ", ".join(kind for _, kind in fused)
        raise ConfigError(
            f"{type(module).__name__} takes another path than when it was quantized ({why}): '{site.path}' is no "
            f"longer followed by {taken}, which is part of its quantized form. {REMEDY}"
        )


def _moved_from(module: nn.Module, site: Site, followed: Followed) -> str:
    """Return the original path of a layer's QModule, if a module was put around it since the model was quantized."""
    present = module.get_submodule(site.path) if site.module is not None else None
    return next((path for path, made in followed.places if made is present and path != site.path), "")


def _has_output(module: nn.Module, path: str) -> bool:
    return getattr(module.get_submodule(path), "acts_quantizer", None) is not None


def _real(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of the float twin: the layer itself instead of its QModule."""
    found = module.get_submodule(path)
    return _float_of(found)


def _float_of(module: nn.Module) -> nn.Module:
    return module.held or module if isinstance(module, Holder) else module


def float_twin(module: TracedModule, followed: Followed) -> nn.Module:
    """Make a throw-away float copy of a traced module, with its current attributes."""
    twin: nn.Module = copy_model(module, shared=(*module.parameters(), followed))
    added = {*followed.op_paths.values(), *followed.inputs.values()}
    for path in added:
        where, _, name = path.rpartition(".")
        twin.get_submodule(where)._modules.pop(name, None)
    for owner in list(twin.modules()):
        if isinstance(owner, TracedModule):
            remove(owner)
        if isinstance(owner, WatchedModule):
            unwatch(owner, removes=True)
        if isinstance(owner, Holder):
            continue
        for name, child in owner._modules.items():
            if child is not None:
                owner._modules[name] = _float_of(child)
    return twin
