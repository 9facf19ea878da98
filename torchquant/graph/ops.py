"""Look nodes of a graph up in the table of operators."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from torchquant.graph.called import SOFTMAX
from torchquant.graph.operator_table import Operator, home_of
from torchquant.graph.operators import OPERATORS
from torchquant.qmodule.patterns import ActivationPattern, norm_of, plain_type, row_of


def name_of(node: fx.Node) -> str:
    """Return the plain name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_of_torch(node: fx.Node) -> bool:
    """Tell whether a node calls a function of torch, torchvision or torchquant, or an operator of Python."""
    return home_of(node.target) in ("torch", "torchvision", "torchquant", "_operator")


def operator_at(node: fx.Node, root: nn.Module) -> Operator | None:
    """Return the operator that a node calls, None for one that is not in the table."""
    if node.op == "call_module":
        return operator_of_module(root.get_submodule(str(node.target)))
    return OPERATORS.of(node.target) if node.op in ("call_function", "call_method") else None


def operator_of_module(module: nn.Module) -> Operator | None:
    """Return the operator of a module; a batch norm that contains an activation counts as a batch norm."""
    return OPERATORS["batch_norm"] if norm_of(module) is not None else OPERATORS.of(plain_type(module))


def computing_operator(node: fx.Node, root: nn.Module) -> Operator | None:
    """Return the operator of a node if it computes new values from quantized ones, else None."""
    found = operator_at(node, root)
    return found if found is not None and found.role == "computes" else None


def passes_values(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether the result of a node lies on the grid of the first input."""
    found = operator_at(node, root)
    if found is None or found.role != "passes":
        return False
    return found.n_reads == 1 or len(node.all_input_nodes) == 1


def is_softmax(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether a node computes a softmax."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) is nn.Softmax
    return node.op.startswith("call") and name_of(node) == SOFTMAX and (node.op == "call_method" or is_of_torch(node))


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalization: of torch, derived from torch's, or by its name of another package."""
    found = (OPERATORS.of(kind) for kind in type(module).__mro__)
    is_known = any(row is not None and (row.role == "normalizes" or row.name == "batch_norm") for row in found)
    return is_known or "Norm" in type(module).__name__


def tells_of_tensors(name: str) -> bool:
    """Tell whether a method or property of Tensor returns a size or a type."""
    found = OPERATORS.of(name)
    return found is not None and found.role == "shape"


def about_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Find the nodes whose result is a size or the like, or is computed only from such results."""
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
    """Return the activation of a node as a module that QWrapper knows; None if the node is no activation."""
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
    """Return the target of a node, or the variant of it that does not write to its input."""
    found = OPERATORS.of(node.target)
    return node.target if found is None else found.out_of_place.get(name_of(node), node.target)
