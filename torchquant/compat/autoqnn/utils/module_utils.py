"""AutoQNN's view of a model as a graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from torch import fx, nn

from torchquant._files import write_whole
from torchquant.compat.autoqnn._refused import refused_names
from torchquant.errors import ConfigError, MissingDependencyError, one_line, require
from torchquant.graph.trace import NotTraceable, traced_graph

PICTURES = (".svg", ".png", ".pdf")
SOURCES = (".gv", ".dot")
"""Endings of files that hold the source in the DOT language."""


def view_module(
    module: nn.Module, input_shapes: Any = None, save_path: str | os.PathLike[str] | None = None
) -> tuple[dict[str, str], list[tuple[str, str]], Any]:
    """Describe a model as a graph: (node -> label, edges, a graphviz `Digraph`, which a notebook draws).

    If torch.fx can trace the forward, nodes are layers and operators; else they are modules, with edges from each to
    its parts. Without the package graphviz the third value is the source in the DOT language, a string; its
    `render`, `pipe` and `view`, and a notebook that shows it, say what to install. `save_path`: a picture, .svg, .png
    or .pdf, the source, .gv or .dot, or a text with a line for each node, .txt. `input_shapes` is an argument of
    AutoQNN and not needed. Raises MissingDependencyError for a picture without graphviz or its program `dot`,
    ConfigError for another ending.

    >>> nodes, edges, dot = view_module(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    >>> edges
    [('input_1', '_0'), ('_0', '_1'), ('_1', 'output')]
    """
    try:
        nodes, edges = _graph(module, traced_graph(module))
    except NotTraceable:
        nodes, edges = _tree(module)
    dot = _digraph(nodes, edges)
    if save_path is not None:
        _save(Path(save_path), nodes, edges, dot)
    return nodes, edges, dot


def _graph(module: nn.Module, graph: fx.Graph) -> tuple[dict[str, str], list[tuple[str, str]]]:
    def label(node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target}: {type(module.get_submodule(str(node.target))).__name__}"
        return str(getattr(node.target, "__name__", node.target))

    kept = [node for node in graph.nodes if node.op != "get_attr"]
    nodes = {node.name: label(node) for node in kept}
    edges = [(a.name, node.name) for node in kept for a in node.all_input_nodes if a.name in nodes]
    return nodes, edges


def _tree(module: nn.Module) -> tuple[dict[str, str], list[tuple[str, str]]]:
    nodes = {path or "model": f"{path or 'model'}: {type(part).__name__}" for path, part in module.named_modules()}
    return nodes, [(path.rpartition(".")[0] or "model", path) for path in nodes if path != "model"]


class DotSource(str):
    """The source of a graph in the DOT language, where the package graphviz, which draws it, is not installed."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        require("graphviz", "autoqnn")
        raise ConfigError("graphviz has been installed since; call view_module again")

    render = pipe = view = _refuse

    def _repr_html_(self) -> str:
        try:
            self._refuse()
        except (MissingDependencyError, ConfigError) as error:
            return f"<p>The graph is not drawn: {error}</p><pre>{self}</pre>"


def _digraph(nodes: dict[str, str], edges: list[tuple[str, str]]) -> Any:
    try:
        graphviz = require("graphviz", "autoqnn")
    except MissingDependencyError:
        lines = [f'  "{name}" [label="{label}"];' for name, label in nodes.items()]
        lines += [f'  "{a}" -> "{b}";' for a, b in edges]
        return DotSource("\n".join(["digraph Net {", *lines, "}"]))
    dot = graphviz.Digraph(
        name="Net", format="png", node_attr={"shape": "box", "style": "filled", "fillcolor": "orange"}
    )
    for name, label in nodes.items():
        dot.node(name, label)
    dot.edges(edges)
    return dot


def _save(path: Path, nodes: dict[str, str], edges: list[tuple[str, str]], dot: Any) -> None:
    if path.suffix in PICTURES:
        drawn = _drawn(dot, path.suffix[1:])
        write_whole(path, lambda temporary: temporary.write_bytes(drawn))
    elif path.suffix in SOURCES or path.suffix == ".txt":
        text = str(dot).rstrip() if path.suffix in SOURCES else _text(nodes, edges)
        write_whole(path, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))
    else:
        allowed = ", ".join((*PICTURES, *SOURCES, ".txt"))
        raise ConfigError(f"save_path must end with one of {allowed}; got {path.name!r}")


def _drawn(dot: Any, format: str) -> bytes:
    try:
        drawn: bytes = dot.pipe(format=format)
    except (RuntimeError, OSError) as error:
        raise MissingDependencyError(
            f"a .{format} needs the program dot of Graphviz (https://graphviz.org/download), which is not installed or "
            f"failed: {one_line(error)}. A save_path with the ending .gv writes the source"
        ) from error
    return drawn


def _text(nodes: dict[str, str], edges: list[tuple[str, str]]) -> str:
    feeds: dict[str, list[str]] = {}
    for a, b in edges:
        feeds.setdefault(a, []).append(b)
    return "\n".join(f"{label}  ->  {', '.join(feeds.get(name, ['-']))}" for name, label in nodes.items())


__getattr__ = refused_names(
    __name__,
    {"clone_module": "it copies a model for meta-learning; torch.func.functional_call runs it with other tensors"},
)
