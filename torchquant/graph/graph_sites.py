"""Find the sites of one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from torchquant._modes import has_hooks
from torchquant.graph.called import ATTENTION
from torchquant.graph.ops import (
    about_tensors,
    activation_of,
    computing_operator,
    is_norm,
    is_softmax,
    name_of,
    operator_at,
    passes_values,
)
from torchquant.graph.sites import (
    NORM_WHY,
    ONLY_FLOAT,
    Found,
    LookInto,
    Region,
    Site,
    SiteInput,
    Unquantized,
    has_layers,
    joined,
    layer_slots,
    layer_types,
    why_other,
)
from torchquant.graph.trace import module_path, owner_path
from torchquant.graph.writes import lies_in_input, written_by
from torchquant.qmodule.patterns import LayerPattern, activation_clamp, norm_of, plain_type, row_of
from torchquant.qmodule.weight_slots import n_values

NO_FORM = "it has no quantized form"
TAKES_WEIGHTS = ", nor have the weights in its arguments"


class GraphSites:
    """The sites of one graph of a region.

    They are collected in `found`; `look_into` continues in a module that the graph calls as a whole. `elsewhere`:
    modules that do not belong to the region. `limits`: path of a layer -> number of parts that may be fused into it.
    `fuse` as in `capture`. `is_read`: whether an operator that can compute with integers reads the result of the
    region.
    """

    def __init__(
        self,
        found: Found,
        region: Region,
        graph: fx.Graph,
        look_into: LookInto,
        elsewhere: frozenset[nn.Module] = frozenset(),
        limits: Mapping[str, int] = MappingProxyType({}),
        fuse: bool | str = True,
        is_read: bool = True,
    ) -> None:
        self.found, self.path, self.root, self.graph = found, region.path, region.module, graph
        self.look_into, self.elsewhere, self.limits = look_into, elsewhere, limits
        self.op_paths, self.fuse, self.is_read = region.op_paths, fuse, is_read
        self.sites: dict[str, Site] = {}
        self.new: set[str] = set()
        self.about = about_tensors(graph)
        calls = (self.module_of(node) for node in graph.nodes if node.op == "call_module" and node not in self.about)
        self.n_calls = Counter(id(module) for module in calls)
        self.site_of: dict[fx.Node, str] = {}  # the last node of a site -> its path
        self.inside: set[fx.Node] = set()  # nodes fused into a site
        self.layers: dict[int, str] = {}  # a layer called again -> its site
        self.needed = self._needed()

    def module_of(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def find(self) -> tuple[Site, ...]:
        """Collect and return the sites, in the order they run."""
        for node in self.graph.nodes:
            if not node.op.startswith("call") or node in self.about or node in self.inside:
                continue
            if node.op == "call_module" and layer_slots(self.module_of(node)):
                self._layer(node)
            elif computing_operator(node, self.root) is not None:
                self._operator(node)
            elif not passes_values(node, self.root):
                self._other(node)
        return tuple(self.sites.values())

    def _put(self, site: Site) -> None:
        self.sites[site.path] = site
        if site.path not in self.found.sites or site.path in self.new:
            self.found.sites[site.path] = site
            self.new.add(site.path)

    def _leave(self, path: str, kind: str, why: str) -> None:
        left = Unquantized(path, kind, why)
        if left not in self.found.floats:
            self.found.floats.append(left)

    def _layer(self, node: fx.Node) -> None:
        module = self.module_of(node)
        path = joined(self.path, str(node.target))
        types = layer_types(module)
        known = self.layers.get(id(module))
        if known is not None:
            site = self.sites[known]
            self.site_of[node] = site.path
            reads = site.reads + self._reads(node, n_values(module))
            is_read = site.is_read or self.needed[node]
            self._put(replace(site, reads=reads, nodes=(*site.nodes, node.name), is_read=is_read))
            return
        if module in self.elsewhere:
            return
        self.found.seen.add(module)
        nodes: list[fx.Node] = [node]
        fused: list[tuple[str, str]] = []
        is_plain = isinstance(row_of(module), LayerPattern) and not has_hooks(module)
        if self.fusable(node) and is_plain and len(node.args) == 1 and not node.kwargs:
            fused = self._limited(self._fuse(nodes, row_of(module)), path, nodes)
        elif isinstance(row_of(module), LayerPattern) and (len(node.args) != 1 or node.kwargs):
            self._leave(path, types[-1], "it is called with more arguments than its input")
            return
        self.layers[id(module)] = path
        site = Site(path, types, layer_slots(module), module, tuple(fused))
        if self._fuses_beyond_clamps(site, nodes[-1]):
            site = replace(site, fields=(*site.fields, "preactivation"))
        self._add(site, nodes, n_values(module))

    def fusable(self, node: fx.Node) -> bool:
        return bool(self.fuse) and self.n_calls[id(self.module_of(node))] == 1

    def _fuses_beyond_clamps(self, site: Site, last: fx.Node) -> bool:
        """Tell whether an activation is fused that a quantizer cannot replace by a clamp."""
        if site.activation is None:
            return False
        path = site.activation[0]
        activation = (
            self.root.get_submodule(path.removeprefix(f"{self.path}.")) if path else activation_of(last, self.root)
        )
        return activation_clamp(activation) is None

    def _limited(self, fused: list[tuple[str, str]], path: str, nodes: list[fx.Node]) -> list[tuple[str, str]]:
        """Limit `fused`, and `nodes` accordingly, to the parts that all ways of the forward share."""
        limit = self.limits.get(path, len(fused))
        if len(nodes) - 1 != len(fused) and limit < len(fused):  # a norm with an activation of its own is one node
            limit = 0
        if limit < len(fused):
            del nodes[limit + 1 :]
        return fused[:limit]

    def _fuse(self, nodes: list[fx.Node], row: Any) -> list[tuple[str, str]]:
        """Fuse a batch norm and an activation after the last of `nodes`; return the fused parts."""
        fused = []
        after = self._only_user(nodes[-1])
        if isinstance(row, LayerPattern) and row.batch_norm is not None and after is not None:
            norm = self.module_of(after) if after.op == "call_module" and self.fusable(after) else None
            if norm is not None and row.batch_norm in (type(norm), norm_of(norm)) and not has_hooks(norm):
                path = joined(self.path, str(after.target))
                fused.append((path, row.batch_norm.__name__))
                nodes.append(after)
                if norm_of(norm) is not None:
                    act = norm.get_submodule("act")
                    return fused if type(act) is nn.Identity else [*fused, (f"{path}.act", plain_type(act).__name__)]
                after = self._only_user(after)
        activation = None if after is None or self.fuse == "bn" else activation_of(after, self.root)
        if after is not None and activation is not None and not has_hooks(activation):
            has_state = next(activation.parameters(), None) is not None
            if not has_state or self.fusable(after):
                path = joined(self.path, str(after.target)) if after.op == "call_module" else ""
                fused.append((path, plain_type(activation).__name__))
                nodes.append(after)
        return fused

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """Return the only node that uses the result, if it uses it once as its first input, else None."""
        users = list(node.users)
        if len(users) != 1 or not users[0].args or users[0].args[0] is not node:
            return None
        return users[0] if users[0].all_input_nodes == [node] else None

    def _operator(self, node: fx.Node) -> None:
        operator = computing_operator(node, self.root)
        assert operator is not None
        kind = operator.family
        module = self.module_of(node) if node.op == "call_module" else None
        types = operator.types if module is None else (*operator.types, plain_type(module).__name__)
        written = written_by(node, self.root)
        if written is not None and lies_in_input(written, self.root):
            self._leave(joined(self.path, module_path(node)), kind, "it writes to its input, which others read too")
            return
        if module is None or (self.n_calls[id(module)] > 1 and not list(module.parameters())):
            path, module = self._new_path(node, operator.path), None
        else:
            path = joined(self.path, str(node.target))
            if module in self.elsewhere or path in self.sites:
                self._leave(path, types[-1], "it is called more than once")
                return
            self.found.seen.add(module)
        if not self.needed[node] and operator.macs is None:
            self._leave(path, types[-1], ONLY_FLOAT)
            return
        nodes = [node]
        fused = self._limited(self._fuse(nodes, None) if self.fuse and self.needed[node] else [], path, nodes)
        fields = ("input", "output") if self.needed[node] else ("input",)
        is_product = operator.macs is not None and module is None
        if is_product and (operator.name == ATTENTION or any(r.softmax for r in self._reads(node, operator.n_reads))):
            fields = (*fields, "probabilities")
        self._add(Site(path, types, fields, module, tuple(fused)), nodes, operator.n_reads)

    def _add(self, site: Site, nodes: list[fx.Node], n_reads: int | None) -> None:
        reads = self._reads(nodes[0], n_reads)
        self.site_of[nodes[-1]] = site.path
        self.inside.update(nodes)
        names = tuple(node.name for node in nodes)
        self._put(replace(site, reads=reads, region=self.path, nodes=names, is_read=self.needed[nodes[-1]]))

    def _reads(self, node: fx.Node, limit: int | None) -> tuple[SiteInput, ...]:
        values: list[fx.Node] = []
        taken = (node.args, node.kwargs) if limit is None else node.args[:limit]
        fx.node.map_arg(taken, values.append)
        real = (value for value in dict.fromkeys(values) if value not in self.about)
        return tuple(SiteInput(value.name, self._sources(value), self._softmax(value)) for value in real)

    def _softmax(self, node: fx.Node) -> str:
        """Return the node of the softmax whose result a node is, through operators that only pass it on."""
        while not is_softmax(node, self.root):
            first = node.args[0] if node.args else None
            if not passes_values(node, self.root) or not isinstance(first, fx.Node):
                return ""
            node = first
        return node.name

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
            if has_layers(module):
                calls = [n for n in self.graph.nodes if n.op == "call_module" and self.module_of(n) is module]
                is_read = any(self.needed[call] for call in calls)
                self.look_into(joined(self.path, str(node.target)), module, is_read)
            else:
                path, kind = joined(self.path, str(node.target)), type(module).__name__
                self._leave(path, kind, NORM_WHY if is_norm(module) else why_other(module) or NO_FORM)
            return
        name = name_of(node)
        is_no_operator = name.startswith("_assert") or name == "getattr" or isinstance(node.target, type)
        if self._takes_values(node) and not is_no_operator:
            path = joined(self.path, module_path(node))
            takes_weights = any(value.op == "get_attr" for value in node.all_input_nodes)
            operator = operator_at(node, self.root)
            is_known_norm = operator is not None and operator.role == "normalizes"
            why = NORM_WHY if is_known_norm else NO_FORM + (TAKES_WEIGHTS if takes_weights else "")
            self._leave(path, name, why)

    def _takes_values(self, node: fx.Node) -> bool:
        return any(value not in self.about for value in node.all_input_nodes)

    def _new_path(self, node: fx.Node, kind: str) -> str:
        """Return a free path for an operator, in the module whose forward calls it."""
        if node.name not in self.op_paths:
            where, taken = owner_path(node), set(self.op_paths.values())
            owner = self.root.get_submodule(where)
            tries = (kind if i == 0 else f"{kind}_{i}" for i in range(len(taken) + len(vars(owner)) + 1))
            paths = (joined(self.path, where, name) for name in tries if not hasattr(owner, name))
            self.op_paths[node.name] = next(path for path in paths if path not in taken)
        return self.op_paths[node.name]

    def _needed(self) -> dict[fx.Node, bool]:
        """Find for each node whether an operator that can compute with integers, or the caller, uses its result."""
        needed: dict[fx.Node, bool] = {}
        for node in reversed(self.graph.nodes):
            needed[node] = any(self._takes_integers(user, needed) for user in node.users)
        return needed

    def _takes_integers(self, user: fx.Node, needed: Mapping[fx.Node, bool]) -> bool:
        if user.op == "output":
            return self.is_read
        if user.op == "call_module":
            module = self.module_of(user)
            if has_layers(module):
                return True
        operator = computing_operator(user, self.root)
        if operator is not None and operator.macs is not None:
            return True
        is_open = operator is not None or passes_values(user, self.root)
        return (is_open or activation_of(user, self.root) is not None) and needed[user]
