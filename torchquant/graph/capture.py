"""Finding the sites of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchquant.errors import ConfigError
from torchquant.graph.ops import (
    about_tensors,
    activation_of,
    computing_module_type,
    computing_type,
    passes_values,
)
from torchquant.graph.sites import LeftFloat, Read, Region, Site
from torchquant.graph.trace import (
    FLAG,
    NotTraceable,
    float_output,
    has_hooks,
    module_path,
    required_arguments,
    traced_graph,
)
from torchquant.qmodule.patterns import LayerRow, norm_of, plain_type, row_of
from torchquant.qmodule.state import QModule
from torchquant.qmodule.weights import weight_names

N_READS = {"EmbeddingBag": 0, "Embedding": 0, "Bilinear": 2, "MultiheadAttention": 3, "attention": 3}
"""Inputs that carry values, where these are not the first only (layers) or all (operators)."""

NORM_WHY = "a normalization stays float"
NO_FORM = "it has no quantized form"
ONE_READ = {"mean", "avg_pool", "batch_norm", "interpolate"}


@dataclass(frozen=True)
class Captured:
    """The sites of a model in the order they run, what stays float, and the graphs behind them."""

    model: nn.Module = field(repr=False)
    sites: tuple[Site, ...]
    floats: tuple[LeftFloat, ...]
    regions: Mapping[str, Region] = field(repr=False)
    trace: bool | str = True
    fuse: bool | str = True

    def site(self, path: str) -> Site | None:
        """The site of that path, if there is one."""
        return next((site for site in self.sites if site.path == path), None)


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
    if any(isinstance(module, QModule) for module in model.modules()):
        raise ConfigError("the model has QModules already; capture the float model, or plan.revert(model) first")
    if trace not in (True, False, "modules"):
        raise ConfigError(f"trace must be True, False or 'modules', got {trace!r}")
    if fuse not in (True, False, "bn"):
        raise ConfigError(f"fuse must be True, False or 'bn', got {fuse!r}")
    finder = _Finder(model, trace, fuse)
    finder.look_into("", model)
    if example_inputs is not None and finder.regions:
        finder.keep_real(example_inputs)
    return Captured(model, tuple(finder.sites), tuple(finder.floats), finder.regions, trace, fuse)


def call_with(model: nn.Module, example_inputs: Any) -> Any:
    """The model on a tensor, a tuple of arguments, or a dictionary of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)


def joined(*parts: str) -> str:
    """A path of parts, empty ones left out."""
    return ".".join(part for part in parts if part)


class _Finder:
    def __init__(self, model: nn.Module, trace: bool | str, fuse: bool | str) -> None:
        self.model, self.trace, self.fuse = model, trace, fuse
        self.norms = _norms_after(model) if trace is not True and fuse == "bn" else {}
        self.sites: list[Site] = []
        self.floats: list[LeftFloat] = []
        self.regions: dict[str, Region] = {}
        self.seen: set[nn.Module] = set()

    def look_into(self, path: str, module: nn.Module) -> None:
        if module in self.seen:
            return
        self.seen.add(module)
        if _layer_fields(module):
            fused = (self.norms[module],) if module in self.norms else ()
            kind = plain_type(module).__name__
            self.sites.append(Site(path, (kind,), _layer_fields(module), module, fused, region=path))
            return
        try:
            if self.trace is not True:
                raise NotTraceable("")
            graph = traced_graph(module, required_arguments(module))
        except NotTraceable as reason:
            self._look_at_children(path, module, str(reason))
        else:
            self.regions[path] = Region(path, module, graph)
            _GraphSites(self, path, module, graph).find()

    def _look_at_children(self, path: str, module: nn.Module, reason: str) -> None:
        self.regions[path] = Region(path, module, None, reason)
        has_sites = len(self.sites)
        for name, child in module.named_children():
            below = joined(path, name)
            kind = computing_module_type(child)
            is_leaf = self.trace == "modules" and next(child.children(), None) is None and not _layer_fields(child)
            if (kind is not None or is_leaf) and child not in self.seen:
                self.seen.add(child)
                types = (*([] if kind is None else [kind]), plain_type(child).__name__)
                if below not in {taken for taken, _ in self.norms.values()}:
                    self.sites.append(Site(below, types, ("input", "output"), child, region=path))
            elif _has_layers(child):
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
        real = _real_values(self.model, self.regions, example_inputs)

        def is_real(region: str, node: str) -> bool:
            return real.get((region, node), True)

        kept = []
        for site in self.sites:
            if site.nodes and not site.is_layer and not is_real(site.region, site.nodes[-1]):
                continue
            reads = tuple(read for read in site.reads if is_real(site.region, read.node))
            kept.append(Site(**{**site.__dict__, "reads": reads}))
        self.sites = kept


def _layer_fields(module: nn.Module) -> tuple[str, ...]:
    if isinstance(row_of(module), LayerRow):
        has_bias = getattr(module, "bias", None) is not None
        return ("weight", "input", "output", *(("bias",) if has_bias else ()))
    if not weight_names(module):
        return ()
    return ("weight", "output") if N_READS.get(plain_type(module).__name__) == 0 else ("weight", "input", "output")


def _has_layers(module: nn.Module) -> bool:
    return any(_layer_fields(m) for m in module.modules())


def _norms_after(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """Layer -> (path, class) of the batch norm that follows it and nothing else, as far as a graph tells."""
    finder = _Finder(model, True, "bn")
    finder.look_into("", model)
    return {
        site.module: site.fused[0] for site in finder.sites if site.module is not None and site.fused and site.is_layer
    }


class _GraphSites:
    """The sites of one graph."""

    def __init__(self, finder: _Finder, path: str, root: nn.Module, graph: fx.Graph) -> None:
        self.finder, self.path, self.root, self.graph = finder, path, root, graph
        self.about = about_tensors(graph)
        calls = (self.module_of(node) for node in graph.nodes if node.op == "call_module" and node not in self.about)
        self.n_calls = Counter(id(module) for module in calls)
        self.site_of: dict[fx.Node, str] = {}  # the last node of a site -> its path
        self.inside: set[fx.Node] = set()  # nodes fused into a site
        self.names: set[str] = set()
        self.layers: dict[int, int] = {}  # a layer called again -> its site
        self.needed = self._needed()

    def module_of(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def find(self) -> None:
        for node in self.graph.nodes:
            if not node.op.startswith("call") or node in self.about or node in self.inside:
                continue
            if node.op == "call_module" and _layer_fields(self.module_of(node)):
                self._layer(node)
            elif computing_type(node, self.root) is not None:
                self._operator(node)
            elif not passes_values(node, self.root):
                self._other(node)

    def _layer(self, node: fx.Node) -> None:
        module = self.module_of(node)
        path = joined(self.path, str(node.target))
        kind = plain_type(module).__name__
        known = self.layers.get(id(module))
        if known is not None:
            site = self.finder.sites[known]
            self.site_of[node] = site.path
            reads = site.reads + self._reads(node, N_READS.get(kind, 1))
            self.finder.sites[known] = Site(**{**site.__dict__, "reads": reads, "nodes": (*site.nodes, node.name)})
            return
        if module in self.finder.seen:
            return
        self.finder.seen.add(module)
        nodes, fused = [node], []
        is_plain = isinstance(row_of(module), LayerRow) and not has_hooks(module)
        if self.fusable(node) and is_plain and len(node.args) == 1 and not node.kwargs:
            fused = self._fuse(nodes, row_of(module))
        elif isinstance(row_of(module), LayerRow) and (len(node.args) != 1 or node.kwargs):
            self.finder.floats.append(LeftFloat(path, kind, "it is called with more than its input"))
            return
        self.layers[id(module)] = len(self.finder.sites)
        self._add(Site(path, (kind,), _layer_fields(module), module, tuple(fused)), nodes, N_READS.get(kind, 1))

    def fusable(self, node: fx.Node) -> bool:
        return bool(self.finder.fuse) and self.n_calls[id(self.module_of(node))] == 1

    def _fuse(self, nodes: list[fx.Node], row: Any) -> list[tuple[str, str]]:
        """Take batch norm and activation after the last of `nodes` in; what was taken."""
        fused = []
        after = self._only_user(nodes[-1])
        if isinstance(row, LayerRow) and row.batch_norm is not None and after is not None:
            norm = self.module_of(after) if after.op == "call_module" and self.fusable(after) else None
            if norm is not None and row.batch_norm in (type(norm), norm_of(norm)) and not has_hooks(norm):
                path = joined(self.path, str(after.target))
                fused.append((path, row.batch_norm.__name__))
                nodes.append(after)
                if norm_of(norm) is not None:
                    act = norm.get_submodule("act")
                    return fused if type(act) is nn.Identity else [*fused, (f"{path}.act", plain_type(act).__name__)]
                after = self._only_user(after)
        activation = None if after is None or self.finder.fuse == "bn" else activation_of(after, self.root)
        if after is not None and activation is not None and not has_hooks(activation):
            has_state = next(activation.parameters(), None) is not None
            if not has_state or self.fusable(after):
                path = joined(self.path, str(after.target)) if after.op == "call_module" else ""
                fused.append((path, plain_type(activation).__name__))
                nodes.append(after)
        return fused

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """The one node that uses the result, as its first input and once; None otherwise."""
        users = list(node.users)
        if len(users) != 1 or not users[0].args or users[0].args[0] is not node:
            return None
        return users[0] if users[0].all_input_nodes == [node] else None

    def _operator(self, node: fx.Node) -> None:
        kind = computing_type(node, self.root)
        assert kind is not None
        module = self.module_of(node) if node.op == "call_module" else None
        types: tuple[str, ...] = (kind,) if module is None else (kind, plain_type(module).__name__)
        if module is None or (self.n_calls[id(module)] > 1 and not list(module.parameters())):
            path, module = self._new_path(node, kind), None
        else:
            path = joined(self.path, str(node.target))
            if module in self.finder.seen:
                self.finder.floats.append(LeftFloat(path, types[-1], "it is called more than once"))
                return
            self.finder.seen.add(module)
        if not self.needed[node]:
            self.finder.floats.append(LeftFloat(path, types[-1], "only float operators read its result"))
            return
        nodes = [node]
        fused = self._fuse(nodes, None) if self.finder.fuse else []
        n_reads = 1 if kind in ONE_READ else N_READS.get(kind)
        self._add(Site(path, types, ("input", "output"), module, tuple(fused)), nodes, n_reads)

    def _add(self, site: Site, nodes: list[fx.Node], n_reads: int | None) -> None:
        reads = self._reads(nodes[0], n_reads)
        self.site_of[nodes[-1]] = site.path
        self.inside.update(nodes)
        names = tuple(node.name for node in nodes)
        self.finder.sites.append(Site(**{**site.__dict__, "reads": reads, "region": self.path, "nodes": names}))

    def _reads(self, node: fx.Node, limit: int | None) -> tuple[Read, ...]:
        values: list[fx.Node] = []
        taken = (node.args, node.kwargs) if limit is None else node.args[:limit]
        fx.node.map_arg(taken, values.append)
        return tuple(Read(v.name, self._sources(v)) for v in dict.fromkeys(values) if v not in self.about)

    def _sources(self, node: fx.Node) -> tuple[str, ...]:
        while node not in self.site_of:
            first = node.args[0] if node.args else None
            if not passes_values(node, self.root) or not isinstance(first, fx.Node):
                return ()
            node = first
        return (self.site_of[node],)

    def _other(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.module_of(node)
            if _has_layers(module):
                self.finder.look_into(joined(self.path, str(node.target)), module)
            else:
                path, kind = joined(self.path, str(node.target)), type(module).__name__
                self.finder.floats.append(LeftFloat(path, kind, NORM_WHY if "Norm" in kind else NO_FORM))
            return
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if self._takes_values(node) and not name.startswith("_assert"):
            path = joined(self.path, module_path(node))
            self.finder.floats.append(LeftFloat(path, name, NORM_WHY if "norm" in name else NO_FORM))

    def _takes_values(self, node: fx.Node) -> bool:
        return any(value not in self.about for value in node.all_input_nodes)

    def _new_path(self, node: fx.Node, kind: str) -> str:
        """A free name for an operator, in the module in whose forward it stands."""
        where = module_path(node)
        owner = self.root.get_submodule(where)
        tries = (kind if i == 0 else f"{kind}_{i}" for i in range(len(self.graph.nodes) + 1))
        name = next(n for n in tries if not hasattr(owner, n) and joined(where, n) not in self.names)
        self.names.add(joined(where, name))
        return joined(self.path, where, name)

    def _needed(self) -> dict[fx.Node, bool]:
        """Whether something that can compute with integers, or the caller, uses the result of a node."""
        needed: dict[fx.Node, bool] = {}
        for node in reversed(self.graph.nodes):
            needed[node] = any(self._takes_integers(user, needed) for user in node.users)
        return needed

    def _takes_integers(self, user: fx.Node, needed: Mapping[fx.Node, bool]) -> bool:
        if user.op == "output":
            return True
        if user.op == "call_module":
            module = self.module_of(user)
            if _has_layers(module):
                return True
        is_open = computing_type(user, self.root) is not None or passes_values(user, self.root)
        return (is_open or activation_of(user, self.root) is not None) and needed[user]


def _real_values(model: nn.Module, regions: Mapping[str, Region], example_inputs: Any) -> dict[tuple[str, str], bool]:
    """(region, node) -> whether its value is a tensor of real numbers, for the nodes that ran."""
    found: dict[tuple[str, str], bool] = {}

    def note(region: Region, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        found[region.path, node.name] = float_output(value) or isinstance(value, tuple | list)

    _run_watched(model, regions, example_inputs, {}, note)
    return found


def watch_values(captured: Captured, example_inputs: Any) -> dict[str, list[tuple[list[Tensor], Any]]]:
    """Site -> (the tensors it takes in, what it gives) for each of its calls on the example."""
    found: dict[str, list[tuple[list[Tensor], Any]]] = {}
    operators = {
        (site.region, site.nodes[0]): site.path for site in captured.sites if site.module is None and site.nodes
    }
    modules = {site.module: site.path for site in captured.sites if site.module is not None}

    def note(region: Region, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        path = operators.get((region.path, node.name))
        if path is not None:
            found.setdefault(path, []).append((list(tensors_in(args)), value))

    def note_module(path: str, args: tuple[Any, ...], value: Any) -> None:
        found.setdefault(path, []).append((list(tensors_in(args)), value))

    _run_watched(captured.model, captured.regions, example_inputs, modules, note, note_module)
    return found


def _run_watched(
    model: nn.Module,
    regions: Mapping[str, Region],
    example_inputs: Any,
    modules: Mapping[nn.Module, str],
    note: Callable[[Region, fx.Node, tuple[Any, ...], Any], None],
    note_module: Callable[[str, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Run the model on the example in evaluation mode; tell of the calls of `modules`, then of every node."""

    class Watch(fx.Interpreter):
        def __init__(self, region: Region) -> None:
            super().__init__(region.module, graph=region.graph)
            self.region = region

        def run_node(self, n: fx.Node) -> Any:
            value = False if n.target == FLAG else super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            note(self.region, n, (*args, *kwargs.values()), value)
            return value

    calls: list[tuple[Region, tuple[Any, ...], dict[str, Any]]] = []
    handles = []
    for region in regions.values():
        if region.graph is not None:

            def keep(module: nn.Module, args: Any, kwargs: Any, region: Region = region) -> None:
                calls.append((region, args, kwargs))

            handles.append(region.module.register_forward_pre_hook(keep, with_kwargs=True))
    for module, path in modules.items():

        def tell(m: nn.Module, args: Any, kwargs: Any, value: Any, path: str = path) -> None:
            assert note_module is not None
            note_module(path, (*args, *kwargs.values()), value)

        handles.append(module.register_forward_hook(tell, with_kwargs=True))
    modes = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in modes:
            m.training = False
        call_with(model, example_inputs)
        for handle in handles:
            handle.remove()
        done: set[str] = set()
        for region, args, kwargs in calls:
            if region.path not in done:
                done.add(region.path)
                Watch(region).run(*_bound(region, args, kwargs))
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes:
            m.training = mode


def _bound(region: Region, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of the graph's inputs in a call."""
    assert region.graph is not None
    values: list[Any] = []
    for i, node in enumerate(n for n in region.graph.nodes if n.op == "placeholder"):
        default = node.args[0] if node.args else None
        values.append(args[i] if i < len(args) else kwargs.get(str(node.target), default))
    return values


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
