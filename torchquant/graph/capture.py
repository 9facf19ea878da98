"""Finding the sites of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchquant.errors import ConfigError, brief
from torchquant.graph.graph_sites import GraphSites
from torchquant.graph.ops import computing_module_type
from torchquant.graph.sites import NORM_WHY, Captured, LeftFloat, Region, Site, has_layers, joined, layer_fields
from torchquant.graph.trace import NotTraceable, traced_graph
from torchquant.graph.watch import real_values
from torchquant.qmodule.patterns import plain_type
from torchquant.qmodule.state import QModule


def capture(
    model: nn.Module, example_inputs: Any = None, trace: bool | str = True, fuse: bool | str = True
) -> Captured:
    """Find every place of the model where a quantizer can sit. The model is not changed.

    Where torch.fx can follow a forward, batch norms and activations are fused into the layers before them and
    operators become sites. Where it cannot, layers are sites one by one, and `floats` tells the reason.

    `example_inputs`: a tensor, a tuple or a dictionary of arguments; with it, only what really is a real
    tensor becomes a site. `trace=False`: layers, one by one, in the forwards as they are; "modules": so are all
    modules without children. `fuse`: "bn" leaves activations alone, False batch norms too; without trace the only
    fusing is "bn". Raises ConfigError for a model that is quantized already.

    >>> [site.path for site in capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).sites]
    ['0', '2']
    """
    if not isinstance(model, nn.Module):
        hint = "; its name is for `torchquant quantize`, here give what builds it" if isinstance(model, str) else ""
        raise ConfigError(f"the model must be a torch.nn.Module, got {brief(model)}{hint}")
    if any(isinstance(module, QModule) for module in model.modules()):
        raise ConfigError("the model has QModules already; capture the float model, or plan.revert(model) first")
    if trace not in (True, False, "modules"):
        raise ConfigError(f"trace must be True, False or 'modules', got {trace!r}")
    if fuse not in (True, False, "bn"):
        raise ConfigError(f"fuse must be True, False or 'bn', got {fuse!r}")
    finder = Finder(model, trace, fuse)
    finder.look_into("", model)
    if example_inputs is not None and finder.regions:
        finder.keep_real(example_inputs)
    return Captured(model, tuple(finder.sites), tuple(finder.floats), finder.regions, trace, fuse)


class Finder:
    """Goes through a model and notes sites, what stays float, and regions."""

    def __init__(self, model: nn.Module, trace: bool | str, fuse: bool | str) -> None:
        self.model, self.trace, self.fuse = model, trace, fuse
        self.norms = _norms_after(model) if trace is not True and fuse == "bn" else {}
        self.sites: list[Site] = []
        self.floats: list[LeftFloat] = []
        self.regions: dict[str, Region] = {}
        self.seen: set[nn.Module] = set()

    def look_into(self, path: str, module: nn.Module) -> None:
        """Note the sites of a module; its own graph if it has one."""
        if module in self.seen:
            return
        self.seen.add(module)
        if layer_fields(module):
            fused = (self.norms[module],) if module in self.norms else ()
            kind = plain_type(module).__name__
            self.sites.append(Site(path, (kind,), layer_fields(module), module, fused, region=path))
            return
        try:
            if self.trace is not True:
                raise NotTraceable("")
            graph = traced_graph(module)
        except NotTraceable as reason:
            self._look_at_children(path, module, str(reason))
        else:
            self.regions[path] = Region(path, module, graph)
            GraphSites(self, path, module, graph).find()

    def _look_at_children(self, path: str, module: nn.Module, reason: str) -> None:
        self.regions[path] = Region(path, module, None, reason)
        has_sites = len(self.sites)
        for name, child in module.named_children():
            below = joined(path, name)
            kind = computing_module_type(child)
            is_leaf = self.trace == "modules" and next(child.children(), None) is None and not layer_fields(child)
            if (kind is not None or is_leaf) and child not in self.seen:
                self.seen.add(child)
                types = (*([] if kind is None else [kind]), plain_type(child).__name__)
                if below not in {taken for taken, _ in self.norms.values()}:
                    self.sites.append(Site(below, types, ("input", "output"), child, region=path))
            elif has_layers(child):
                self.look_into(below, child)
            elif "Norm" in type(child).__name__ and child not in self.seen:
                self.seen.add(child)
                self.floats.append(LeftFloat(below, type(child).__name__, NORM_WHY))
        is_container = type(module).forward is nn.Module.forward
        if reason and not is_container and len(self.sites) > has_sites:
            self.floats.append(LeftFloat(path, type(module).__name__, f"operators between its layers: {reason}"))

    @torch.no_grad()
    def keep_real(self, example_inputs: Any) -> None:
        """Drop the sites and reads whose values, on the example, are not tensors of real numbers."""
        real = real_values(self.model, self.regions, example_inputs)

        def is_real(region: str, node: str) -> bool:
            return real.get((region, node), True)

        kept = []
        for site in self.sites:
            if site.nodes and not site.is_layer and not is_real(site.region, site.nodes[-1]):
                continue
            reads = tuple(read for read in site.reads if is_real(site.region, read.node))
            kept.append(replace(site, reads=reads))
        self.sites = kept


def _norms_after(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """Layer -> (path, class) of the batch norm that follows it and nothing else, as far as a graph tells."""
    finder = Finder(model, True, "bn")
    finder.look_into("", model)
    return {
        site.module: site.fused[0] for site in finder.sites if site.module is not None and site.fused and site.is_layer
    }
