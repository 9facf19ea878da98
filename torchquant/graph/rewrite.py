"""Insert quantizers where a plan says, and remove them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from torchquant.errors import ConfigError
from torchquant.graph.called import ATTENTION, SOFTMAX
from torchquant.graph.calls import Signature
from torchquant.graph.edit import GraphEditor
from torchquant.graph.guards import Guard
from torchquant.graph.ops import activation_of, out_of_place
from torchquant.graph.own_inputs import expect_slots
from torchquant.graph.sites import Captured, Region, Site, SitePlan, joined, naming
from torchquant.graph.traced import Followed, Held, TracedModule, Variant, install, remove
from torchquant.graph.watched import WatchedModule, WatchedProduct, unwatch, watch
from torchquant.qmodule import QModule, QOp, QWeights, QWrapper
from torchquant.qmodule.attention import QAttention
from torchquant.qmodule.float_checkpoints import link_float_state, unlink_float_state
from torchquant.qmodule.fused import unwatch_fused_paths, watch_fused_paths
from torchquant.qmodule.fused_part import FusedPart
from torchquant.qmodule.input_slots import InputSlots
from torchquant.qmodule.lean import set_lean
from torchquant.qmodule.patterns import norm_of, split_norm
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.qmodule.weights import weight_names
from torchquant.range_observers._statistics import StatisticTracker

SHARE = "share"
"""Value of a concatenation's output: its operands share one quantizer, and the concatenation has none."""
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
    """The changes of a model, in order: (module, name, the child that was there before or None).

    `example`: the example inputs of `quantize`, as tensors without values; None without them.
    """

    root: nn.Module | None = None
    swaps: list[tuple[nn.Module, str, nn.Module | None]] = field(default_factory=list)
    inplace: list[Any] = field(default_factory=list)
    """Activations that wrote to their input, which version 0.1 kept from it."""
    example: Any = None


def rewrite(captured: Captured, plans: Mapping[str, SitePlan]) -> nn.Module:
    """Change the captured model in place; return it, or the QModule that replaces it if it is a layer itself."""
    model = captured.model
    float_state = dict(model.state_dict(keep_vars=True))
    writer = _Writer(captured, plans)
    root = writer.write()
    link_float_state(root, float_state)
    watch_fused_paths(root)
    root.conversion = writer.conversion  # type: ignore[assignment]
    root.register_load_state_dict_pre_hook(_expect_slots)
    return root


def _expect_slots(root: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    expect_slots(root, state_dict, prefix)


def revert(model: nn.Module) -> nn.Module:
    """Turn a quantized model back into the float model, in place, with the current weights. Raises ConfigError."""
    conversion = getattr(model, "conversion", None)
    if not isinstance(conversion, Conversion):
        raise ConfigError(f"{type(model).__name__} was not made by a plan, so there is nothing to revert")
    set_lean(model, False)
    for module in list(model.modules()):
        if isinstance(module, InputSlots) and module.has_slots:
            module.store(module.layer, module.float_weight_of(module.weight_slots()[0].weight))
        if isinstance(module, QModule):
            layer = module.held
            if layer is not None:
                _move_hooks(module, layer)
    for module in list(model.modules()):
        if isinstance(module, TracedModule):
            remove(module)
        if isinstance(module, WatchedModule):
            unwatch(module)
    for owner, name, child in reversed(conversion.swaps):
        if child is None:
            owner._modules.pop(name, None)  # `read_own_input` may have removed it
        else:
            owner._modules[name] = child
    for activation in conversion.inplace:
        activation.inplace = True
    float_model = conversion.root or model
    unwatch_fused_paths(float_model)
    del model.conversion
    unlink_float_state(model)
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _expect_slots:
            del model._load_state_dict_pre_hooks[key]
    return float_model


def _set_mode(module: nn.Module, training: bool) -> None:
    """Give a new module and its quantizers the mode of the module they replace; layers in it keep theirs."""
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
        self.made: dict[str, Any] = {}
        self.root = self.model
        self.quantized = {path for path, plan in self.plans.items() if plan.output is not None}
        self.editors = {path: [GraphEditor(way.graph) for way in r.ways] for path, r in captured.regions.items()}
        self.inputs: dict[str, dict[tuple[str, str], str]] = {path: {} for path in captured.regions}
        self.watched = {path: [WatchedProduct(call) for call in calls] for path, calls in captured.products.items()}
        self.held = {
            path: [[_held(guard, region.module) for guard in way.traced.guards] for way in region.ways]
            for path, region in captured.regions.items()
        }

    def write(self) -> nn.Module:
        for site in self.captured.sites:
            plan = self.plans.get(site.path)
            if plan is None or plan.output == SHARE:
                continue
            region = self.captured.regions.get(site.region)
            if site.called is not None:
                self._watch(site, site.called, plan)
                continue
            for editor, twin in self._in_graphs(region, site):
                self._quantize_inputs(editor, region, twin, plan)
            made = self.made[site.path] = self._make(site, plan, region)
            _join_calls(made, self._n_calls(site))
            for editor, twin in self._in_graphs(region, site):
                editor.call(twin, _local(region, site.path))
        self._share_outputs()
        for path, watched in (
            self.watched.items() if any(w.children for ws in self.watched.values() for w in ws) else ()
        ):
            watch(self.model.get_submodule(path), watched)
        for region in self.captured.regions.values():
            if region.ways and any(site.region == region.path for site in self._written()):
                self._install(region)
        return self.root

    def _written(self) -> list[Site]:
        return [site for site in self.captured.sites if site.path in self.made]

    def _in_graphs(self, region: Region | None, site: Site) -> list[tuple[GraphEditor, Site]]:
        """Return the graphs that contain the site, with the site as it is in each."""
        if region is None:
            return []
        pairs = zip(self.editors[region.path], region.ways, strict=True)
        return [(editor, own) for editor, way in pairs for own in way.sites if own.path == site.path]

    def _n_calls(self, site: Site) -> int:
        """Return how often a site runs in one forward, as far as graphs and the example show."""
        counts = self.captured.counts
        if site.module is None:
            return counts.get(site.region, 1)
        return max(counts.get(site.path, 1), 1 if site.fused else len(site.nodes))

    def _install(self, region: Region) -> None:
        followed = Followed(
            Signature.of(type(region.module).forward),
            [
                Variant(region.pattern, held, way.graph)
                for held, way in zip(self.held[region.path], region.ways, strict=True)
            ],
            region.node_names,
            {node: _local(region, path) for node, path in region.op_paths.items()},
            inputs=self.inputs[region.path],
        )
        for site in (site for way in region.ways for site in way.sites):
            path, plan = _local(region, site.path), self.plans.get(site.path)
            followed.known.add(path)
            if site.path in self.made:
                followed.fused[path] = site.fused
                followed.places.append((path, self.made[site.path]))
            specs = {} if plan is None else _specs(plan)
            followed.input_specs.update({path: specs["input"]} if "input" in specs else {})
            followed.softmax_specs.update({path: specs["probabilities"]} if "probabilities" in specs else {})
        added = {path.rpartition(".")[0] for path in (*followed.op_paths.values(), *followed.inputs.values())}
        walked = {path for way in region.ways for path in way.traced.walked & added}
        followed.walks = any(type(region.module.get_submodule(path)) is not nn.Sequential for path in walked)
        inlined = {path for way in region.ways for path in way.traced.inlined}
        followed.seal(region.module, tuple(inlined))
        install(region.module, followed)

    def _make(self, site: Site, plan: SitePlan, region: Region | None) -> QModule:
        """Make the QModule of a site and put it in its place in the model."""
        if site.module is not None and site.is_layer:
            made = self._layer(site, plan)
        else:
            op = site.module if site.module is not None else _function(region, site)
            reads_here = None if site.nodes else plan.make("input", site.module)
            made = _operator(op, site, plan, self._activation(site), reads_here)
        if site.module is not None:
            self._swap(site.module, made)
        else:
            self._add(site.path, made)
        if site.fused:
            made.is_split = True
            self._take_parts(site, made, region)
        return made

    def _layer(self, site: Site, plan: SitePlan) -> QModule:
        module = site.module
        assert module is not None
        reads_here = None if site.nodes else plan.make("input", module)
        names = weight_names(module)
        if names:
            weights = {name: plan.make("weight", module) for name in names}
            given = {name: quantizer for name, quantizer in weights.items() if quantizer is not None}
            acts = plan.make("output", module)
            with naming(site.path):
                return QWeights(module, given, acts, reads_here)
        layers = [module]
        activation = self._activation(site)
        if site.batch_norm is not None:
            norm = self.model.get_submodule(site.batch_norm[0])
            layers.append(norm if norm_of(norm) is None else split_norm(norm))
        layers += [] if activation is None else [activation]
        weight, acts, bias, before = (plan.make(n, module) for n in ("weight", "output", "bias", "preactivation"))
        with naming(site.path):
            return QWrapper(layers, weight, acts, plan.fold_bn, reads_here, bias, before)

    def _activation(self, site: Site) -> nn.Module | None:
        if site.activation is None:
            return None
        path = site.activation[0]
        if path:
            return self.model.get_submodule(path)
        region = self.captured.regions[site.region]
        return activation_of(_node(region, site, -1), region.module)

    def _take_parts(self, site: Site, made: QModule, region: Region | None) -> None:
        """Let each part that is fused into a module pass its input through, because the module computes the part."""
        for path, _ in site.fused:
            owner, _, name = path.rpartition(".")
            if not path or (name == "act" and any(owner == taken for taken, _ in site.fused)):
                continue  # a function, or the activation inside a norm
            part, target = self.model.get_submodule(path), _local(region, path)
            graphs = [] if region is None else [editor.graph for editor in self.editors[region.path]]
            if all(sum(n.op == "call_module" and n.target == target for n in graph.nodes) <= 1 for graph in graphs):
                self._swap(part, FusedPart(made, part), moves_hooks=False)

    def _swap(self, module: nn.Module, new: nn.Module, moves_hooks: bool = True) -> None:
        """Put `new` wherever the model holds `module`; hooks stay with the place."""
        _set_mode(new, module.training)
        if moves_hooks:
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

    def _quantize_inputs(self, editor: GraphEditor, region: Region | None, site: Site, plan: SitePlan) -> None:
        if region is None:
            return
        paths = self.inputs[region.path]

        def module_for(node: str, spec: str, slot: str) -> str:
            if (node, spec) not in paths:
                path = self._input_path(region.path, node)
                self._add(path, QOp(nn.Identity(), plan.make(slot, site.module)))
                _join_calls(self.model.get_submodule(path), self.captured.counts.get(region.path, 1))
                paths[node, spec] = _local(region, path)
            return paths[node, spec]

        editor.quantize_inputs(site, _specs(plan), self.quantized, module_for)

    def _watch(self, site: Site, called: int, plan: SitePlan) -> None:
        """Let children of a module compute a product in its forward, which is not traced, and quantize what it reads.

        What a softmax has made is quantized where the softmax is called, before a dropout.
        """
        calls, name = self.watched[site.region], _local(self.captured.regions[site.region], site.path)
        own = calls[called]
        is_attention = own.product.operator == ATTENTION
        operands = [""] * len(own.product.operands)
        for i, made in enumerate(own.product.operands):
            slot = "probabilities" if made >= 0 and plan.probabilities is not None else "input"
            if getattr(plan, slot) is None or (made >= 0 and calls[made].operands):
                continue
            what = SOFTMAX if made >= 0 else ("query", "key", "value")[i] if is_attention else f"{name}_{i}"
            path = self._input_path(site.region, what)
            self._add(path, QOp(nn.Identity(), plan.make(slot, None)))
            _join_calls(self.model.get_submodule(path), self.captured.counts.get(site.path, 1))
            child = path.rpartition(".")[2]
            if made >= 0:
                calls[made] = replace(calls[made], operands=(child,))
            else:
                operands[i] = child
        made_here = self.made[site.path] = _operator(own.product.target, site, plan)
        self._add(site.path, made_here)
        calls[called] = replace(own, site=name, operands=tuple(operands))

    def _input_path(self, region: str, node: str) -> str:
        owner = self.model.get_submodule(region)
        name = f"quantize_{node}"
        while hasattr(owner, name):
            name += "_"
        return joined(region, name)

    def _share_outputs(self) -> None:
        """Let all operands of a concatenation with output "share" share one quantizer."""
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
                        f"site '{site.path}', output: 'share' needs a quantizer at the output of each of its operands; "
                        f"{member or 'an input'} has none. Give it one, or another output to '{site.path}'"
                    )
                if member != members[0]:
                    leader[member] = members[0]
            leader[site.path] = members[0]
        for path, module in self.made.items():
            if path in leader:
                module.acts_quantizer = self.made[find(path)].acts_quantizer


def _join_calls(made: nn.Module, n_calls: int) -> None:
    """Let activation quantizers see all calls of one forward as one batch, so that their range covers all calls."""
    quantizers = made.quantizers() if isinstance(made, QModule) else {}
    for name in ACTIVATIONS:
        for tracker in quantizers[name].modules() if n_calls > 1 and name in quantizers else ():
            if isinstance(tracker, StatisticTracker):
                tracker.n_calls = n_calls


def _held(guard: Guard, root: nn.Module) -> Held:
    module = None if guard.is_global else root.get_submodule(guard.where)
    return Held(module, guard.where, guard.name, guard.value)


def _specs(plan: SitePlan) -> dict[str, str]:
    """Return slot -> the key by which quantizers of inputs are shared: the spec; one that a function makes is not."""
    specs = {slot: getattr(plan, slot) for slot in ("input", "probabilities")}
    keys = {slot: spec if isinstance(spec, str) else plan.path for slot, spec in specs.items() if spec is not None}
    return {slot: key if slot == "input" else f"{slot} {key}" for slot, key in keys.items()}


def _operator(op: Any, site: Site, plan: SitePlan, activation: nn.Module | None = None, reads_here: Any = None) -> QOp:
    """Make the QModule of an operator."""
    output = plan.make("output", site.module)
    if site.types[0] == ATTENTION and plan.probabilities is not None:
        return QAttention(op, plan.make("probabilities", site.module), output, activation, reads_here)
    return QOp(op, output, activation, reads_here)


def _node(region: Region, site: Site, which: int) -> fx.Node:
    """Return a node of the site in the graph before any change."""
    return next(node for way in region.ways for node in way.graph.nodes if node.name == site.nodes[which])


def _function(region: Region | None, site: Site) -> Any:
    """Return the function, method of Tensor, or shared module that the operator calls."""
    assert region is not None
    node = _node(region, site, 0)
    if node.op == "call_module":
        return region.module.get_submodule(str(node.target))
    target = out_of_place(node)
    return getattr(torch.Tensor, target) if isinstance(target, str) else target


def _local(region: Region | None, path: str) -> str:
    return path.removeprefix(f"{region.path}.") if region is not None and region.path else path
