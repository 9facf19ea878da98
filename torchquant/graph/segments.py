"""Run graphs of a model in segments: the parts that modules inside it have in them, each a module to watch and call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from torchquant.graph.trace import module_path
from torchquant.graph.traced import TracedModule, Variant, compiled


class Segment(nn.Module):
    """Consecutive nodes of a graph as a module: called with the values that they read, returns those read after them.

    `root`: the module that runs the graph, whose path is `above`. `path`: that of the module whose forward is in the
    graph; "" for the nodes between such modules. `calls`: the paths of the modules that the segment calls.
    """

    def __init__(
        self, root: nn.Module, above: str, path: str, nodes: Sequence[fx.Node], kept: Iterable[fx.Node]
    ) -> None:
        super().__init__()
        self.path = path
        self.calls = tuple(_joined(above, str(node.target)) for node in nodes if node.op == "call_module")
        own = set(nodes)
        self.reads = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
        later = set(kept)
        self.returns = [node for node in nodes if node in later]
        self.__dict__["root"] = root  # not a child: the segment is no place in the model
        self.run = self._compiled(nodes)

    def _compiled(self, nodes: Sequence[fx.Node]) -> Callable[..., Any]:
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.reads:
            made[node] = graph.placeholder(node.name)
        for node in nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        if nodes[-1].op != "output":
            graph.output(tuple(made[node] for node in self.returns))
        return compiled(graph)

    def forward(self, *values: Any) -> Any:
        """Run the nodes."""
        return self.run(self.root, *values)


class _InSegments:
    """A graph as a function that calls its segments one after the other, and drops each value after its last use."""

    def __init__(self, root: nn.Module, above: str, graph: fx.Graph, spans: dict[str, range]) -> None:
        nodes = list(graph.nodes)
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        body = nodes[len(self.inputs) :]
        begins = {span.start - len(self.inputs): (path, len(span)) for path, span in spans.items()}
        self.segments: list[Segment] = []
        at = 0
        while at < len(body):
            path, n = begins.get(at, ("", min((b for b in begins if b > at), default=len(body)) - at))
            later = [read for node in body[at + n :] for read in node.all_input_nodes]
            self.segments.append(Segment(root, above, path, body[at : at + n], later))
            at += n
        self.last_use = {node: segment for segment in self.segments for node in segment.reads}

    def __call__(self, root: nn.Module, *values: Any) -> Any:
        held = dict(zip(self.inputs, values, strict=True))
        found: Any = None
        for segment in self.segments:
            found = segment(*(held[node] for node in segment.reads))
            for node in [node for node in held if self.last_use.get(node) is segment]:
                del held[node]
            if segment is not self.segments[-1]:
                held.update(zip(segment.returns, found, strict=True))
        return found


def spans_of(graph: fx.Graph, paths: Iterable[str]) -> dict[str, range]:
    """Find the nodes of each module in a graph that contains its forward: path -> range of indices.

    Modules without a node, and those whose nodes come before the end of another's, are left out.
    """
    nodes = list(graph.nodes)
    owners = [str(n.target) if n.op in ("call_module", "get_attr") else module_path(n) for n in nodes]
    found: dict[str, range] = {}
    for path in paths:
        inside = [i for i, owner in enumerate(owners) if f"{owner}.".startswith(f"{path}.")]
        if inside:
            found[path] = range(inside[0], inside[-1] + 1)
    ordered = sorted(found.items(), key=lambda item: item[1].start)
    clear, end = {}, 0
    for path, span in ordered:
        if span.start >= end:
            clear[path] = span
            end = span.stop
    return clear


@contextmanager
def in_segments(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, list[nn.Module]]]:
    """Run each module at these paths as a module, also where a graph has its forward; yields what runs it, by path.

    That is the module itself where it is called, else its segment in each variant of the graph. Modules whose nodes are
    mixed with those of another are left out: they cannot be called alone.
    """
    found: dict[str, list[nn.Module]] = {}
    within: dict[str, list[str]] = {}
    traced = {path: module for path, module in model.named_modules() if isinstance(module, TracedModule)}
    for path in paths:
        above = next((a for a, module in traced.items() if _relative(path, a) in _inlined(module)), None)
        if above is None:
            found[path] = [model.get_submodule(path)]
        else:
            within.setdefault(above, []).append(path)
    variants: list[tuple[Variant, Callable[..., Any]]] = []
    try:
        for above, inside in within.items():
            root, relative = traced[above], [_relative(path, above) for path in inside]
            for variant in root.followed.variants:
                runner = _InSegments(root, above, variant.graph, spans_of(variant.graph, relative))
                variants.append((variant, variant.run))
                variant.run = runner
                for segment in runner.segments:
                    if segment.path:
                        found.setdefault(_joined(above, segment.path), []).append(segment)
        yield found
    finally:
        for variant, run in variants:
            variant.run = run


def _joined(above: str, path: str) -> str:
    return f"{above}.{path}" if above else path


def _relative(path: str, above: str) -> str:
    return path.removeprefix(f"{above}.") if above else path


def _inlined(module: TracedModule) -> set[str]:
    return {path for path, *_ in module.followed.inlined if path}
