"""The ONNX form of each operator in the table of operators, and how ONNX Runtime executes it."""

from __future__ import annotations

from dataclasses import dataclass

from torchquant._arguments import checked
from torchquant.errors import ConfigError, NameClashError
from torchquant.graph import OPERATORS
from torchquant.qmodule.own_forward import PRODUCTS


@dataclass(frozen=True)
class OnnxForm:
    """The form of one operator in an ONNX file.

    `nodes`: the types of node that torch's exporter writes for it. `kernels`: the integer kernels that ONNX Runtime
    fuses it into between codes; `tables`: kernels that look float32 results up in a table. `moves`: whether its nodes
    only move codes or select some of them. `why_float`: the reason if it has neither.
    """

    nodes: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    moves: bool = False
    why_float: str = ""


_NO_KERNEL = "ONNX Runtime has no integer kernel for it"


def _float(*nodes: str, tables: tuple[str, ...] = ()) -> OnnxForm:
    return OnnxForm(nodes, tables=tables, why_float=_NO_KERNEL)


def _moving(*nodes: str) -> OnnxForm:
    return OnnxForm(nodes, moves=True)


ONNX_FORMS: dict[str, OnnxForm] = {
    "add": OnnxForm(("Add",), ("QLinearAdd",)),
    "sub": _float("Sub"),
    "mul": OnnxForm(("Mul",), ("QLinearMul",)),
    "div": _float("Div", "Mul"),
    "subtract": _float("Sub"),
    "multiply": OnnxForm(("Mul",), ("QLinearMul",)),
    "divide": _float("Div", "Mul"),
    "matmul": OnnxForm(("MatMul",), ("QLinearMatMul", "MatMulInteger")),
    "baddbmm": _float("MatMul", "Add", "Mul"),
    "addmm": _float("Gemm", "MatMul", "Add", "Mul"),
    "einsum": _float("Einsum"),
    "attention": _float("MatMul", "Mul", "Sqrt", "Softmax", "Transpose", "Add", "IsNaN", "Where"),
    "cat": OnnxForm(("Concat",), ("QLinearConcat",), moves=True),
    "stack": OnnxForm(("Concat", "Unsqueeze"), ("QLinearConcat",), moves=True),
    "mean": OnnxForm(("GlobalAveragePool", "ReduceMean"), ("QLinearGlobalAveragePool",), ("QLinearReduceMean",)),
    "avg_pool": OnnxForm(("AveragePool",), ("QLinearAveragePool",)),
    "adaptive_avg_pool": OnnxForm(
        ("GlobalAveragePool", "AveragePool"), ("QLinearGlobalAveragePool", "QLinearAveragePool")
    ),
    "batch_norm": _float("BatchNormalization"),
    "interpolate": _moving("Resize"),
    "relu": _moving("Relu"),
    "relu6": _moving("Clip"),
    "hardtanh": _moving("Clip"),
    "clamp": _moving("Clip"),
    "max": _moving("ReduceMax"),
    "max_pool": _moving("MaxPool"),
    "adaptive_max_pool": _moving("MaxPool"),
    "reshape": _moving("Reshape", "Flatten"),
    "transpose": _moving("Transpose"),
    "squeeze": _moving("Squeeze", "Unsqueeze"),
    "expand": _moving("Expand"),
    "repeat": _moving("Tile", "Expand", "Reshape", "Unsqueeze"),
    "slice": _moving("Slice", "Gather", "Squeeze"),
    "gather": _moving("Gather", "GatherElements"),
    "roll": _moving("Slice", "Concat"),
    "split": _moving("Split", "Slice", "Squeeze"),
    "dropout": _moving("Identity"),
    "identity": _moving("Identity"),
    "clone": _moving("Identity"),
    "to": _moving("Identity"),
    "pad": _moving("Pad"),
    "pixel_shuffle": _moving("DepthToSpace", "SpaceToDepth", "Reshape", "Transpose"),
    "silu": _float("Sigmoid", "Mul"),
    "gelu": _float("Gelu"),
    "hardswish": _float("HardSwish"),
    "hardsigmoid": _float("HardSigmoid"),
    "leaky_relu": _float("LeakyRelu", tables=("QLinearLeakyRelu",)),
    "elu": _float("Elu"),
    "mish": _float("Mish", "Softplus", "Tanh", "Mul"),
    "sigmoid": _float("Sigmoid", tables=("QLinearSigmoid",)),
    "tanh": _float("Tanh"),
    "norm": _float("LayerNormalization", "GroupNormalization", "InstanceNormalization", "LRN"),
    **{
        function.__name__: OnnxForm(("Conv",), ("QLinearConv", "ConvInteger"))
        if "transpose" not in function.__name__
        else _float("ConvTranspose")
        for function in PRODUCTS.values()
    },
    "linear": OnnxForm(("Gemm", "MatMul"), ("QGemm", "QLinearMatMul", "MatMulInteger")),
}
"""Name of an operator -> its form in an ONNX file."""

EXACT_KERNELS: set[str] = set()
"""Operators of ONNX Runtime that the integer reference reproduces: any difference counts."""

TABLE_KERNELS = {"QLinearSoftmax", "QLinearWhere"}
"""Operators that look their float32 results up in tables: a difference of one step is allowed."""

MOVERS: set[str] = set()
"""Operators that move codes or select some of them: as exact as their input."""


def _take_in(form: OnnxForm) -> None:
    """Sort the node types of a form by what they do to codes."""
    EXACT_KERNELS.update(form.kernels)
    TABLE_KERNELS.update(form.tables)
    if form.moves:
        MOVERS.update(form.nodes)


for _form in ONNX_FORMS.values():
    _take_in(_form)

REORDERING = MOVERS - {"Concat", "Pad", "Resize", "Clip", "Relu"}
"""Operators that have the same result before and after a DequantizeLinear, whatever their settings."""

LOOKED_THROUGH = MOVERS - {"Concat"}
"""Operators through which ONNX Runtime moves codes, or which it drops if the codes behind them clamp as well."""

RUNTIME_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice"}
"""Operators past which ONNX Runtime itself moves a pair of QuantizeLinear and DequantizeLinear."""

STOPPING = {"Split", "Pad"}
"""Operators that move codes but through which ONNX Runtime moves none: the file quantizes their results again."""


@checked
def register_onnx(name: str, form: OnnxForm) -> None:
    """Register the ONNX form of an operator that `torchquant.graph.register_operator` has added to the table.

    The nodes that torch's exporter writes for it do not change. Behind nodes that move codes (`moves`) the file
    quantizes on the same grid again, so that the layers behind them compute in integers, and a certificate compares
    them with the codes that they read. Raises ConfigError for a name that is not in the table, NameClashError if it
    already has another form.

    >>> from torchquant.graph import register_operator
    >>> row = register_operator("tril", "tril", "passes", n_reads=1)
    >>> register_onnx("tril", OnnxForm(("Trilu",), moves=True))
    """
    if name not in OPERATORS:
        raise ConfigError(f"there is no operator '{name}'; add it with torchquant.graph.register_operator")
    known = ONNX_FORMS.setdefault(name, form)
    if known != form:
        raise NameClashError(f"the operator '{name}' already has the form {known}; got {form}")
    STOPPING.update(set(form.nodes) - MOVERS if form.moves else ())
    _take_in(form)
