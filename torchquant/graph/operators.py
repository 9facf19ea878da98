"""The table of operators: the facts that quantization needs about each. `register_operator` adds to it.

`graph/` reads which operators are sites and which pass a grid on, `plan/` which names rules can use, `graph/macs.py`
how multiply-adds are counted. The integer reference and the ONNX export register handlers under its names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import nn

from torchquant._arguments import checked
from torchquant._shown import shown
from torchquant.errors import ConfigError, NameClashError
from torchquant.graph.operator_table import ROLES, CountMacs, Operator, OperatorTable, Target
from torchquant.graph.products import attention_macs, einsum_macs, matrix_macs, transposed_macs, weighted_macs
from torchquant.qmodule.own_forward import PRODUCTS


def _made(kind: type[nn.Module], *names: str) -> Callable[..., nn.Module]:
    """Return a function: arguments of a functional activation after its input -> the module."""

    def make(*args: Any, **kwargs: Any) -> nn.Module:
        return kind(**dict(zip(names, args, strict=False)), **kwargs)

    return make


def _passing(name: str, *targets: Target, **more: Any) -> Operator:
    """Make an operator that passes values of its first input on; its other arguments are sizes, indices and so on."""
    return Operator(name, targets, "passes", n_reads=1, **more)


def _activation(kind: type[nn.Module], *names: str) -> Operator:
    """Make the operator of an activation. names: the arguments of its function after the input."""
    name = {nn.SiLU: "silu", nn.LeakyReLU: "leaky_relu"}.get(kind, kind.__name__.lower())
    return Operator(name, (name, kind), "activates", n_reads=1, activation=_made(kind, *names))


def _each_rank(*names: str) -> tuple[Target, ...]:
    """List functions and modules of torch for 1, 2 and 3 axes. names: of the function and the module, without rank."""
    function, module = names
    return (*(f"{function}{n}d" for n in (1, 2, 3)), *(getattr(nn, f"{module}{n}d") for n in (1, 2, 3)))


_NO_DIVISION = "no runtime divides integers by integers"
_NO_SUM = "the summand is on a grid of its own, and no runtime has a kernel for a sum and a product on three grids"
_COMPUTING = (
    Operator(
        "add",
        ("add", "__add__", "__radd__", "__iadd__"),
        "computes",
        out_of_place={"iadd": operator.add, "add_": "add"},
    ),
    Operator(
        "sub",
        ("sub", "__sub__", "__rsub__", "__isub__"),
        "computes",
        out_of_place={"isub": operator.sub, "sub_": "sub"},
    ),
    Operator(
        "mul",
        ("mul", "__mul__", "__rmul__", "__imul__"),
        "computes",
        out_of_place={"imul": operator.mul, "mul_": "mul"},
    ),
    Operator(
        "div",
        ("div", "truediv", "__truediv__", "__rtruediv__", "__itruediv__"),
        "computes",
        out_of_place={"itruediv": operator.truediv, "div_": "div"},
        why_float=_NO_DIVISION,
    ),
    Operator("subtract", ("subtract",), "computes", "sub", path="subtract"),
    Operator("multiply", ("multiply",), "computes", "mul", path="multiply"),
    Operator("divide", ("divide", "true_divide"), "computes", "div", path="divide", why_float=_NO_DIVISION),
    Operator("matmul", ("matmul", "bmm", "mm", "__matmul__", "__rmatmul__"), "computes", macs=matrix_macs),
    Operator("baddbmm", ("baddbmm",), "computes", "matmul", macs=matrix_macs, why_float=_NO_SUM),
    Operator("addmm", ("addmm",), "computes", "matmul", path="addmm", macs=matrix_macs, why_float=_NO_SUM),
    Operator(
        "einsum",
        ("einsum",),
        "computes",
        "matmul",
        macs=einsum_macs,
        why_float="runtimes compute any sum of products in float32",
    ),
    Operator(
        "attention",
        ("scaled_dot_product_attention",),
        "computes",
        n_reads=3,
        macs=attention_macs,
        why_float="the softmax between its two products is float32",
    ),
    Operator("cat", ("cat", "concat", "concatenate"), "computes"),
    Operator("stack", ("stack",), "computes", "cat"),
    Operator("mean", ("mean",), "computes", n_reads=1),
    Operator("avg_pool", _each_rank("avg_pool", "AvgPool"), "computes", n_reads=1),
    Operator(
        "adaptive_avg_pool", _each_rank("adaptive_avg_pool", "AdaptiveAvgPool"), "computes", "avg_pool", n_reads=1
    ),
    Operator(
        "batch_norm",
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        "computes",
        n_reads=1,
        why_float="behind a layer it is folded into it; elsewhere runtimes compute it in float32",
    ),
    Operator("interpolate", ("interpolate", nn.Upsample), "computes", n_reads=1),
)
_PASSING = (
    _passing("relu", "relu", nn.ReLU, out_of_place={"relu_": "relu"}, activation=_made(nn.ReLU, "inplace")),
    _passing("relu6", "relu6", nn.ReLU6, activation=_made(nn.ReLU6, "inplace")),
    _passing(
        "hardtanh",
        *("hardtanh", nn.Hardtanh),
        out_of_place={"hardtanh_": F.hardtanh},
        activation=_made(nn.Hardtanh, "min_val", "max_val", "inplace"),
    ),
    Operator("clamp", ("clamp", "clip"), "passes", out_of_place={"clamp_": "clamp", "clip_": "clip"}),
    Operator("max", ("max", "amax"), "passes"),
    _passing("max_pool", *_each_rank("max_pool", "MaxPool")),
    _passing("adaptive_max_pool", *_each_rank("adaptive_max_pool", "AdaptiveMaxPool")),
    _passing(
        "reshape",
        *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous"),
        *(nn.Flatten, nn.Unflatten),
        may_be_view=True,
    ),
    _passing(
        "transpose",
        *("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"),
        may_be_view=True,
        names=("Permute",),
    ),
    _passing("squeeze", "squeeze", "unsqueeze", may_be_view=True),
    _passing("expand", "expand", "expand_as", "broadcast_to", may_be_view=True),
    _passing("repeat", "repeat", "tile", "repeat_interleave"),
    _passing("slice", "getitem", "__getitem__", "select", "narrow", may_be_view=True),
    _passing("gather", "gather", "index_select"),
    _passing("roll", "roll", "flip"),
    _passing("split", "split", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", may_be_view=True),
    _passing(
        "dropout",
        *("dropout", "dropout1d", "dropout2d", "dropout3d"),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        may_be_view=True,
        names=("StochasticDepth", "stochastic_depth", "DropPath", "drop_path"),
    ),
    _passing("identity", nn.Identity, "detach", may_be_view=True, names=("run_hooks",)),
    _passing("clone", "clone"),
    _passing("to", "to", "type_as", "float", may_be_view=True),
    _passing(
        "pad",
        *("pad", nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(getattr(nn, f"{kind}Pad{n}d") for kind in ("Reflection", "Replication", "Circular") for n in (1, 2, 3)),
    ),
    _passing(
        "pixel_shuffle",
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
        *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    ),
)
_ACTIVATIONS = (
    _activation(nn.SiLU, "inplace"),
    _activation(nn.GELU, "approximate"),
    _activation(nn.Hardswish, "inplace"),
    _activation(nn.Hardsigmoid, "inplace"),
    _activation(nn.LeakyReLU, "negative_slope", "inplace"),
    _activation(nn.ELU, "alpha", "inplace"),
    _activation(nn.Mish, "inplace"),
    _activation(nn.Sigmoid),
    _activation(nn.Tanh),
)
_NORMS = Operator(
    "norm",
    (
        *("layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "batch_norm", "normalize"),
        *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
    "normalizes",
)
_LAYERS = tuple(
    Operator(f.__name__, (f.__name__,), "layer", macs=transposed_macs if "transpose" in f.__name__ else weighted_macs)
    for f in PRODUCTS.values()
)
_SHAPES = Operator(
    "size",
    (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"),
        *("get_device", "is_floating_point", "is_complex", "is_signed", "is_contiguous"),
        *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse"),
    ),
    "shape",
)

OPERATORS = OperatorTable((*_COMPUTING, *_PASSING, *_ACTIVATIONS, _NORMS, *_LAYERS, _SHAPES))
"""All known operators."""


@checked
def register_operator(
    name: str,
    targets: Target | Sequence[Target],
    role: str = "",
    n_reads: int | None = None,
    macs: CountMacs | None = None,
    out_of_place: Mapping[str, Target] | None = None,
) -> Operator:
    """Add an operator to the table, or further targets to an existing operator; return its row.

    `targets`: functions and module classes; strings are names of functions of torch and methods of Tensor. A function
    outside of torch, or a class, becomes one node of a graph: the function must be a global of the file whose forward
    calls it. `role` of a new operator: "computes" for new values, which makes it a site that rules select by `name`;
    "passes" for values of its first input, which stay on their grid. `n_reads`: how many of its first inputs carry
    values; None: all. `macs(arguments, result)` counts multiply-adds; None: none. `out_of_place`: name of a variant
    that writes to its input -> the variant that does not.

    The integer reference runs an operator that passes values on directly on the codes, and one that computes in float32
    between codes, unless it has a handler (`torchquant.deploy.integer.operators.register_integer`).
    Raises ConfigError, NameClashError.

    >>> import torch
    >>> from torchquant import quantize
    >>> row = register_operator("maximum", ["maximum"], "computes")
    >>> class Larger(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return torch.maximum(self.a(x), self.b(x))
    >>> rules = [{"types": ["maximum"], "output": "affine:8"}]
    >>> quantize(Larger(), rules, torch.ones(1, 4)).maximum.acts_quantizer.n_bits
    8
    """
    listed = (targets,) if isinstance(targets, str) or callable(targets) else tuple(targets)
    if not listed or not all(isinstance(target, str) or callable(target) for target in listed):
        raise ConfigError(f"targets must be functions, module classes or names of them, got {shown(targets)}")
    if not name.isidentifier():
        raise ConfigError(f"name must consist of letters, digits and _, got {shown(name)}")
    if n_reads is not None and n_reads < 1:
        raise ConfigError(f"n_reads must be at least 1, or None for all inputs; got {n_reads}")
    known = OPERATORS.get(name)
    if known is None and role not in ROLES:
        raise ConfigError(f"the new operator '{name}' needs a role, one of {', '.join(ROLES)}; got {shown(role)}")
    row = known or Operator(name, (), role, n_reads=n_reads, macs=macs)
    given = {"role": role or row.role, "n_reads": n_reads or row.n_reads, "macs": macs or row.macs}
    for key, value in given.items():
        if value != (there := getattr(row, key)):
            raise NameClashError(f"the operator '{name}' is registered with {key} = {shown(there)}; got {shown(value)}")
    row = replace(
        row,
        targets=tuple(dict.fromkeys((*row.targets, *listed))),
        out_of_place={**row.out_of_place, **(out_of_place or {})},
        why_float=row.why_float or ("" if row.role == "passes" else "no integer handler is registered for it"),
    )
    OPERATORS.put(row)
    return row
