"""What the nodes of a graph are, by the table of operators."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from torchquant.graph.operator_table import Operator, home_of
from torchquant.graph.operators import OPERATORS
from torchquant.qmodule.patterns import ActivationPattern, norm_of, plain_type, row_of


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_of_torch(node: fx.Node) -> bool:
    """Whether the function that a node calls is torch's or torchvision's, ours, or an operator of Python."""
    return home_of(node.target) in ("torch", "torchvision", "torchquant", "_operator")


def operator_at(node: fx.Node, root: nn.Module) -> Operator | None:
    """The operator that a node calls, None for one that is not in the table."""
    if node.op == "call_module":
        return operator_of_module(root.get_submodule(str(node.target)))
    return OPERATORS.of(node.target) if node.op in ("call_function", "call_method") else None


def operator_of_module(module: nn.Module) -> Operator | None:
    """The operator that a module is; a batch norm with an activation in it is one."""
    return OPERATORS["batch_norm"] if norm_of(module) is not None else OPERATORS.of(plain_type(module))


def computing_operator(node: fx.Node, root: nn.Module) -> Operator | None:
    """The operator of a node if it computes new values from quantized ones, else None."""
    found = operator_at(node, root)
    return found if found is not None and found.role == "computes" else None


def passes_values(node: fx.Node, root: nn.Module) -> bool:
    """Whether the result lies on the grid of the first input."""
    found = operator_at(node, root)
    if found is None or found.role != "passes":
        return False
    return found.n_reads == 1 or len(node.all_input_nodes) == 1


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization: one of torch, one below it, or by its name one of another package."""
    found = (OPERATORS.of(kind) for kind in type(module).__mro__)
    is_known = any(row is not None and (row.role == "normalizes" or row.name == "batch_norm") for row in found)
    return is_known or "Norm" in type(module).__name__


def tells_of_tensors(name: str) -> bool:
    """Whether the method or property of Tensor tells a size or a kind."""
    found = OPERATORS.of(name)
    return found is not None and found.role == "shape"


def about_tensors(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose result is a size or the like, or computed from nothing but those."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_getter = node.target is getattr and len(node.args) > 1 and tells_of_tensors(str(node.args[1]))
        is_call = node.op == "call_method" and tells_of_tensors(str(node.target))
        inputs = node.all_input_nodes
        derived = node.op in ("call_function", "call_method") and bool(inputs) and found.issuperset(inputs)
        if is_getter or is_call or derived:
            found.add(node)
    return found


def activation_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The activation a node is, as a module that QWrapper knows; None where it is none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return module if isinstance(row_of(module), ActivationPattern) else None
    found = operator_at(node, root)
    make = None if found is None else found.activation
    if found is None or make is None or any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None
    try:
        made = make(*node.args[1:], **node.kwargs)
    except TypeError:
        return None
    if name_of(node) in found.out_of_place:
        made.inplace = True  # type: ignore[assignment]
    return made


def out_of_place(node: fx.Node) -> Any:
    """What a node calls, or what computes the same without writing to its input."""
    found = OPERATORS.of(node.target)
    return node.target if found is None else found.out_of_place.get(name_of(node), node.target)
