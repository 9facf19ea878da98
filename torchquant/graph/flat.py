"""Convert graphs to flat lists, which can be pickled however deep the graph is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class NodeRef:
    """A node by name, because pickling a graph directly recurses as deep as the graph is long."""

    name: str


@dataclass(frozen=True)
class FunctionRef:
    """A function by its address: pickle cannot find F.max_pool2d, which is made inside another function."""

    module: str
    name: str


def flattened(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Convert the nodes of a graph, in order, to tuples of plain data and functions."""

    def refer(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: NodeRef(node.name))  # type: ignore[arg-type, return-value]

    return [(n.name, n.op, _named(n.target), refer(n.args), refer(n.kwargs), n.type) for n in graph.nodes]


def _named(target: Any) -> Any:
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    return FunctionRef(target.__module__, target.__name__)


def unflattened(flat: list[tuple[Any, ...]]) -> fx.Graph:
    """Rebuild the graph that `flattened` was given."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, NodeRef):
            return nodes[value.name]
        if isinstance(value, tuple | list):
            parts = [resolve(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        return value

    for name, op, target, args, kwargs, kind in flat:
        if isinstance(target, FunctionRef):
            target = getattr(importlib.import_module(target.module), target.name)
        nodes[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name, kind)
    return graph
