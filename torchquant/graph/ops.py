"""What the operators of a graph mean to quantization: which compute new values, which only pass values on."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchquant.qmodule.patterns import ActivationRow, norm_of, plain_type, row_of

Target = Callable[..., Any] | str

# Type of an operator in rules -> its functions, its Tensor methods (as strings), its modules.
COMPUTING: dict[str, tuple[Target, ...]] = {
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "sub": (operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    "mul": (operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    "div": (operator.truediv, operator.itruediv, torch.div, "div", "div_"),
    "matmul": (operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", torch.baddbmm, torch.einsum),
    "attention": (F.scaled_dot_product_attention,),
    "cat": (torch.cat, torch.concat, torch.concatenate, torch.stack),
    "mean": (torch.mean, "mean"),
    "avg_pool": (
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    ),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "interpolate": (F.interpolate, nn.Upsample),
}

# The result holds values of the first input, or zero, or the end of a range: it lies on the same grid.
PASSING: tuple[Target, ...] = (
    *(F.relu, F.relu6, torch.relu, F.hardtanh, "relu", "relu_", torch.clamp, "clamp", "clamp_"),
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(torch.flatten, "flatten", nn.Flatten, nn.Unflatten, "unflatten", "view", "view_as"),
    *("reshape", torch.reshape, "permute", torch.permute, "transpose", torch.transpose, "t", "contiguous"),
    *(
        "squeeze",
        torch.squeeze,
        "unsqueeze",
        torch.unsqueeze,
        "expand",
        "expand_as",
        "repeat",
        "movedim",
        torch.movedim,
    ),
    *(operator.getitem, torch.select, "select", "narrow", torch.narrow, "roll", torch.roll, "flip", torch.flip),
    *("chunk", torch.chunk, "split", torch.split, "unbind", torch.unbind, torch.tensor_split, "tensor_split"),
    *(F.dropout, F.dropout2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity),
    *(F.pad, nn.ZeroPad2d, F.pixel_shuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *("reshape_as", "type_as", "swapaxes", torch.swapaxes, "broadcast_to", torch.broadcast_to, "tile", torch.tile),
    *("index_select", torch.index_select, "gather", torch.gather, "repeat_interleave", torch.repeat_interleave),
    *("detach", "clone", "to", "float", torch.amax, torch.max, "amax"),
)

# Results that are no tensor of real numbers: sizes, kinds, whether something holds.
_ABOUT_TENSORS = {"size", "dim", "numel", "ndimension", "shape", "stride", "get_device", "ndim", "dtype", "device"}

MULTIPLYING = {"matmul", "attention"}
"""Operators of many multiply-adds: their inputs are quantized also where only float operators read the result."""

_COMPUTING = {target: name for name, targets in COMPUTING.items() for target in targets}
_PASSING_NAMES = {"StochasticDepth", "stochastic_depth", "DropPath", "drop_path", "Permute", "run_hooks"}


def _made(kind: type[nn.Module], *names: str) -> Callable[..., nn.Module]:
    """Arguments of a functional activation after its input -> the module."""

    def make(*args: Any, **kwargs: Any) -> nn.Module:
        return kind(**dict(zip(names, args, strict=False)), **kwargs)

    return make


OUT_OF_PLACE: dict[Target, Target] = {
    **{operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul},
    **{operator.itruediv: operator.truediv, "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div"},
    **{"relu_": "relu", "clamp_": "clamp", torch.relu_: torch.relu},
}
"""What does the same and leaves its inputs as they are: a quantized tensor must not be written to."""

FUNCTIONAL_ACTIVATIONS: dict[Target, Callable[..., nn.Module]] = {
    F.relu: _made(nn.ReLU, "inplace"),
    torch.relu: _made(nn.ReLU),
    "relu": _made(nn.ReLU),
    "relu_": lambda: nn.ReLU(inplace=True),
    F.relu6: _made(nn.ReLU6, "inplace"),
    F.silu: _made(nn.SiLU, "inplace"),
    F.gelu: _made(nn.GELU, "approximate"),
    F.hardswish: _made(nn.Hardswish, "inplace"),
    F.hardsigmoid: _made(nn.Hardsigmoid, "inplace"),
    F.leaky_relu: _made(nn.LeakyReLU, "negative_slope", "inplace"),
    F.elu: _made(nn.ELU, "alpha", "inplace"),
    F.mish: _made(nn.Mish, "inplace"),
    F.sigmoid: _made(nn.Sigmoid),
    torch.sigmoid: _made(nn.Sigmoid),
    "sigmoid": _made(nn.Sigmoid),
    F.tanh: _made(nn.Tanh),
    torch.tanh: _made(nn.Tanh),
    "tanh": _made(nn.Tanh),
}


def _target(node: fx.Node, root: nn.Module) -> Any:
    """What the node calls: a function, the name of a method, the class of a module."""
    if node.op == "call_module":
        return plain_type(root.get_submodule(str(node.target)))
    return node.target


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_of_torch(node: fx.Node) -> bool:
    """Whether the function that a node calls is torch's, or an operator of Python."""
    return str(getattr(node.target, "__module__", "")).startswith(("torch", "_operator"))


def computing_type(node: fx.Node, root: nn.Module) -> str | None:
    """The type of an operator that computes new values from quantized ones, None for another node."""
    if node.op == "call_module":
        return computing_module_type(root.get_submodule(str(node.target)))
    return _COMPUTING.get(node.target) if node.op.startswith("call") else None


def computing_module_type(module: nn.Module) -> str | None:
    """`computing_type` of a module."""
    return "batch_norm" if norm_of(module) is not None else _COMPUTING.get(plain_type(module))


def passes_values(node: fx.Node, root: nn.Module) -> bool:
    """Whether the result lies on the grid of the first input."""
    if not node.op.startswith("call"):
        return False
    target = _target(node, root)
    return target in PASSING or getattr(target, "__name__", "") in _PASSING_NAMES


def about_tensors(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose result is a size or the like, or computed from nothing but those."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_getter = node.target is getattr and len(node.args) > 1 and node.args[1] in _ABOUT_TENSORS
        is_call = node.op == "call_method" and node.target in _ABOUT_TENSORS
        inputs = node.all_input_nodes
        derived = node.op in ("call_function", "call_method") and bool(inputs) and found.issuperset(inputs)
        if is_getter or is_call or derived:
            found.add(node)
    return found


def activation_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The activation a node is, as a module that QWrapper knows; None where it is none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return module if isinstance(row_of(module), ActivationRow) else None
    make = FUNCTIONAL_ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if make is None or any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None
    try:
        return make(*node.args[1:], **node.kwargs)
    except TypeError:
        return None
