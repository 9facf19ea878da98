"""Order in-place operators of a graph: find the readers of a tensor after it was written to.

In a graph with quantizers a tensor and its quantized form are two tensors, so a reader of one would not see a write to
the other. Every reader after the write is therefore given the result of the write, and a graph in which a reader holds
another view of the same memory is refused.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from torchquant.graph.operator_table import writes_by_name
from torchquant.graph.operators import OPERATORS
from torchquant.graph.ops import is_of_torch, name_of
from torchquant.qmodule.patterns import norm_of, row_of

_IN_PLACE: set[Any] = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
}
_IN_PLACE |= {operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem}
_MORE_VIEWS = {
    *("double", "half", "bfloat16", "cpu", "cuda", "type", "getattr", "real", "imag", "diagonal", "unfold", "positive"),
    *("as_strided", "alias", "feature_dropout", "alpha_dropout", "requires_grad_", "identity", "view_as_real"),
    *("as_tensor", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "data", "T", "mT", "H"),
}
"""Functions that may return a view of their input, besides those in the table of operators."""
_MORE_VIEW_MODULES = (nn.AlphaDropout, nn.FeatureAlphaDropout)


def _is_view(target: Any) -> bool:
    """Tell whether the result of a function, method or class can share the memory of its input, by the table."""
    found = OPERATORS.of(target)
    return found is not None and found.may_be_view


def written_by(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the value that the node writes to, None if it writes to none."""
    first: Any = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return first if getattr(module, "inplace", False) is True else None
    if node.op == "call_function" and isinstance(node.kwargs.get("out"), fx.Node):
        return node.kwargs["out"]  # type: ignore[return-value]
    name = name_of(node)
    is_named_so = writes_by_name(name)
    is_asked_to = node.kwargs.get("inplace") is True or (
        node.op == "call_function" and "inplace" in _arguments(node.target) and _positional(node, "inplace") is True
    )
    writes = node.target in _IN_PLACE or (node.op in ("call_method", "call_function") and is_named_so) or is_asked_to
    return first if node.op.startswith("call") and writes else None


def _arguments(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount]


def _positional(node: fx.Node, name: str) -> Any:
    place = _arguments(node.target).index(name)
    return node.args[place] if place < len(node.args) else None


def _may_be_view(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether the result may share the memory of an input."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if getattr(module, "inplace", False) is True:
            return True
        is_layer = row_of(module) is not None or norm_of(module) is not None
        is_view = isinstance(module, _MORE_VIEW_MODULES) or any(_is_view(kind) for kind in type(module).__mro__)
        is_stock = type(module).__module__.startswith("torch.nn.modules") and not is_view
        return not (is_layer or is_stock) or isinstance(module, nn.Sequential)
    if not node.op.startswith("call"):
        return False
    if written_by(node, root) is not None or name_of(node) in _MORE_VIEWS or _is_view(node.target):
        return True
    return node.op == "call_function" and not is_of_torch(node) and not _is_built_in(node.target)


def _is_built_in(target: Any) -> bool:
    return type(target).__name__ in ("builtin_function_or_method", "method_descriptor")


def order_writes(graph: fx.Graph, root: nn.Module) -> fx.Node | None:
    """Give readers after a write the result of the write; return a node whose write cannot be traced, if any."""
    memory: dict[fx.Node, int] = {}  # node -> number of the memory it may share
    members: dict[int, list[fx.Node]] = {}
    attributes: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        sources = [n for n in node.all_input_nodes if n in memory] if _may_be_view(node, root) else []
        if node.op == "get_attr" and attributes.setdefault(node.target, node) is not node:
            sources = [attributes[node.target]]
        number = memory[sources[0]] if sources else len(memory)
        memory[node] = number
        members.setdefault(number, []).append(node)
        for other in sources[1:]:  # a view of one of several: all count as one memory
            for member in members.pop(memory[other], []) if memory[other] != number else []:
                memory[member] = number
                members[number].append(member)
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = written_by(node, root)
        if target is None:
            continue
        for reader in [user for user in target.users if place[user] > place[node]]:
            reader.replace_input_with(target, node)
        seen_before = [m for m in members[memory[node]] if m is not target and place[m] < place[node]]
        if any(place[user] > place[node] for member in seen_before for user in member.users):
            return node
    return None


def lies_in_input(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether the value may share the memory of an argument, a parameter or a buffer."""
    while node.op.startswith("call"):
        if not _may_be_view(node, root):
            return False
        sources = node.all_input_nodes
        if any(source.op in ("placeholder", "get_attr") for source in sources) or not sources:
            return bool(sources)
        node = sources[0]
    return node.op in ("placeholder", "get_attr")
