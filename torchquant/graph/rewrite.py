"""Putting quantizers where a plan says, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from torchquant.errors import ConfigError
from torchquant.graph.ops import OUT_OF_PLACE, activation_of
from torchquant.graph.sites import Captured, Region, Site, SitePlan, joined
from torchquant.graph.trace import FLAG, TracedModule, install_graph, remove_graph
from torchquant.qmodule import QModule, QOp, QWeights, QWrapper
from torchquant.qmodule.float_checkpoints import forget_float, speak_float
from torchquant.qmodule.fused import unwatch_fused_paths, watch_fused_paths
from torchquant.qmodule.patterns import norm_of, split_norm
from torchquant.qmodule.weights import weight_names

SHARE = "share"
"""As the output of a concatenation: what it joins shares one quantizer, and it has none of its own."""
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Conversion:
    """What was changed in a model, in order: (module, name, the child that was there before or None)."""

    root: nn.Module | None = None
    swaps: list[tuple[nn.Module, str, nn.Module | None]] = field(default_factory=list)
    inplace: list[Any] = field(default_factory=list)
    """Activations that wrote to their input."""


def rewrite(captured: Captured, plans: Mapping[str, SitePlan]) -> nn.Module:
    """Change the captured model in place; the model, or what took its place if it is a layer itself."""
    model = captured.model
    float_state = dict(model.state_dict(keep_vars=True))
    writer = _Writer(captured, plans)
    root = writer.write()
    speak_float(root, float_state)
    watch_fused_paths(root)
    root.conversion = writer.conversion  # type: ignore[assignment]
    return root


def revert(model: nn.Module) -> nn.Module:
    """The float model again, in place, with the weights as they are now. Raises ConfigError."""
    conversion = getattr(model, "conversion", None)
    if not isinstance(conversion, Conversion):
        raise ConfigError(f"{type(model).__name__} was not made by a plan, so there is nothing to revert")
    for module in list(model.modules()):
        if isinstance(module, QModule):
            layer = module.held
            if layer is not None:
                _move_hooks(module, layer)
    for module in list(model.modules()):
        if isinstance(module, TracedModule):
            remove_graph(module)
    for owner, name, child in reversed(conversion.swaps):
        if child is None:
            del owner._modules[name]
        else:
            owner._modules[name] = child
    for activation in conversion.inplace:
        activation.inplace = True
    float_model = conversion.root or model
    unwatch_fused_paths(float_model)
    del model.conversion
    forget_float(model)
    return float_model


def _set_mode(module: nn.Module, training: bool) -> None:
    """Give a new module and its quantizers the mode of what they take the place of; layers in it keep theirs."""
    module.training = training
    for quantizer in module.quantizers().values() if isinstance(module, QModule) else ():
        quantizer.train(training)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    for name in _HOOKS:
        hooks = getattr(source, name)
        getattr(target, name).update(hooks)
        hooks.clear()
    if source._is_full_backward_hook is not None:
        target._is_full_backward_hook, source._is_full_backward_hook = source._is_full_backward_hook, None


class _Writer:
    def __init__(self, captured: Captured, plans: Mapping[str, SitePlan]) -> None:
        self.captured, self.model = captured, captured.model
        self.plans = {path: plan for path, plan in plans.items() if not plan.is_float}
        self.conversion = Conversion()
        self.homes: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for owner in self.model.modules():
            for name, child in owner._modules.items():
                if child is not None:
                    self.homes.setdefault(child, []).append((owner, name))
        self.made: dict[str, QModule] = {}
        self.inputs: dict[tuple[str, str, Any], fx.Node] = {}
        self.fused: dict[tuple[str, str], fx.Node] = {}
        """(region, name) of a node that was fused into a site -> the node of the site."""
        self.root: nn.Module = self.model

    def write(self) -> nn.Module:
        for site in self.captured.sites:
            plan = self.plans.get(site.path)
            if plan is not None and plan.output != SHARE:
                self._quantize_inputs(site, plan)
                self._write_site(site, plan)
        self._share_outputs()
        for region in self.captured.regions.values():
            if region.graph is not None and any(site.region == region.path for site in self._written()):
                self._keep_inputs(region, region.graph)
                install_graph(region.module, region.graph)
        return self.root

    def _written(self) -> list[Site]:
        return [site for site in self.captured.sites if site.path in self.made]

    def _write_site(self, site: Site, plan: SitePlan) -> None:
        region = self.captured.regions.get(site.region)
        nodes = _nodes(region, site)
        if isinstance(site.module, nn.Module) and site.is_layer:
            made = self._layer(site, plan, nodes)
            self._swap(site.module, made)
        else:
            op = site.module if site.module is not None else _function(region, nodes[0])
            reads_here = None if nodes else plan.make("input", site.module)
            made = QOp(op, plan.make("output", site.module), self._activation(site, nodes), reads_here)
            if site.module is not None:
                self._swap(site.module, made)
            else:
                assert region is not None
                self._add(site.path, made)
                _call_module(region, nodes[0], site.path)
        self.made[site.path] = made
        if site.fused and nodes:
            assert region is not None
            assert region.graph is not None
            nodes[-1].replace_all_uses_with(nodes[0])
            for node in reversed(nodes[1:]):
                self.fused[site.region, node.name] = nodes[0]
                region.graph.erase_node(node)

    def _keep_inputs(self, region: Region, graph: fx.Graph) -> None:
        """Let what is left of activations and the like not write to quantized tensors."""
        for node in graph.nodes:
            if node.op == "call_module" and node.target != FLAG:
                module = region.module.get_submodule(str(node.target))
                if getattr(module, "inplace", False) is True and not isinstance(module, QModule):
                    self.conversion.inplace.append(module)
                    module.inplace = False  # type: ignore[assignment]
            elif node.op in ("call_function", "call_method"):
                node.target = OUT_OF_PLACE.get(node.target, node.target)
                if node.kwargs.get("inplace") is True:
                    node.kwargs = {**node.kwargs, "inplace": False}

    def _layer(self, site: Site, plan: SitePlan, nodes: list[fx.Node]) -> QModule:
        module = site.module
        assert module is not None
        reads_here = None if nodes else plan.make("input", module)
        names = weight_names(module)
        if names:
            weights = {name: plan.make("weight", module) for name in names}
            given = {name: quantizer for name, quantizer in weights.items() if quantizer is not None}
            return QWeights(module, given, plan.make("output", module), reads_here)
        layers = [module]
        activation = self._activation(site, nodes)
        if site.fused and "BatchNorm" in site.fused[0][1]:
            norm = self._take(site.fused[0][0])
            layers.append(norm if norm_of(norm) is None else split_norm(norm))
        layers += [] if activation is None else [activation]
        weight, acts, bias = (plan.make(name, module) for name in ("weight", "output", "bias"))
        return QWrapper(layers, weight, acts, plan.fold_bn, reads_here, bias)

    def _activation(self, site: Site, nodes: list[fx.Node]) -> nn.Module | None:
        if not site.fused or "BatchNorm" in site.fused[-1][1]:
            return None
        path = site.fused[-1][0]
        if not path:
            return activation_of(nodes[-1], self.captured.regions[site.region].module)
        module = self.model.get_submodule(path)
        return self._take(path) if next(module.parameters(), None) is not None else module

    def _take(self, path: str) -> nn.Module:
        """The module at the path, which gets an Identity in its place."""
        module = self.model.get_submodule(path)
        self._swap(module, nn.Identity())
        return module

    def _swap(self, module: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever the model holds `module`; hooks go with the place."""
        _set_mode(new, module.training)
        _move_hooks(module, new)
        if module is self.model:
            self.root, self.conversion.root = new, module
        for owner, name in self.homes.get(module, []):
            self.conversion.swaps.append((owner, name, module))
            owner._modules[name] = new

    def _add(self, path: str, module: nn.Module) -> None:
        owner_path, _, name = path.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        _set_mode(module, owner.training)
        self.conversion.swaps.append((owner, name, None))
        owner.add_module(name, module)

    def _quantize_inputs(self, site: Site, plan: SitePlan) -> None:
        """Quantize the values that the site reads and that nothing has quantized yet, each once."""
        region = self.captured.regions.get(site.region)
        if plan.input is None or region is None or region.graph is None or not site.nodes:
            return
        readers = [n for n in _nodes(region, site) if not site.fused or n.name == site.nodes[0]]
        for read in site.reads:
            if any(source in self.plans and self.plans[source].output is not None for source in read.sources):
                continue
            key = (site.region, read.node, plan.input if isinstance(plan.input, str) else site.path)
            value = self.fused.get((site.region, read.node)) or _by_name(region.graph)[read.node]
            if key not in self.inputs:
                path = self._input_path(site.region, read.node)
                self._add(path, QOp(nn.Identity(), plan.make("input", site.module)))
                self.inputs[key] = self._insert_after(region, value, path)
            for reader in readers:
                reader.replace_input_with(value, self.inputs[key])

    def _input_path(self, region: str, node: str) -> str:
        owner = self.model.get_submodule(region)
        name = f"quantize_{node}"
        while hasattr(owner, name):
            name += "_"
        return joined(region, name)

    @staticmethod
    def _insert_after(region: Region, value: fx.Node, path: str) -> fx.Node:
        assert region.graph is not None
        after = value
        while after.next.op == "placeholder":
            after = after.next
        with region.graph.inserting_after(after):
            return region.graph.call_module(_local(region, path), (value,))

    def _share_outputs(self) -> None:
        """One quantizer for all that a concatenation with output "share" joins."""
        shared = {path for path, plan in self.plans.items() if plan.output == SHARE}
        leader: dict[str, str] = {}

        def find(path: str) -> str:
            while path in leader:
                path = leader[path]
            return path

        for site in self.captured.sites:
            if site.path not in shared:
                continue
            members = [find(source) for read in site.reads for source in read.sources or ("",)]
            for member in members:
                quantizer = getattr(self.made.get(member), "acts_quantizer", None)
                if member not in shared and quantizer is None:
                    raise ConfigError(
                        f"site '{site.path}', output: 'share' needs a quantizer at the output of everything it joins; "
                        f"{member or 'an input'} has none. Give it one, or another output to '{site.path}'"
                    )
                if member != members[0]:
                    leader[member] = members[0]
            leader[site.path] = members[0]
        for path, module in self.made.items():
            if path in leader:
                module.acts_quantizer = self.made[find(path)].acts_quantizer


def _by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes}


def _nodes(region: Region | None, site: Site) -> list[fx.Node]:
    if region is None or region.graph is None:
        return []
    known = _by_name(region.graph)
    return [known[name] for name in site.nodes]


def _function(region: Region | None, node: fx.Node) -> Any:
    """What the node calls: a function, a method of Tensor, or a module that others call too."""
    if node.op == "call_module":
        assert region is not None
        return region.module.get_submodule(str(node.target))
    target = OUT_OF_PLACE.get(node.target, node.target)
    return getattr(torch.Tensor, target) if isinstance(target, str) else target


def _local(region: Region, path: str) -> str:
    return path.removeprefix(f"{region.path}.") if region.path else path


def _call_module(region: Region, node: fx.Node, path: str) -> None:
    """Let the node call a module; it keeps its name and its arguments."""
    node.op, node.target = "call_module", _local(region, path)
