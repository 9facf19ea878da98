"""What operators are in an ONNX file, by their names in the table of operators, and what ONNX Runtime makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from torchquant.qmodule.own_forward import PRODUCTS


@dataclass(frozen=True)
class OnnxForm:
    """One operator in a file.

    `nodes`: the types of node that torch's exporter writes for it. `kernels`: what ONNX Runtime fuses it into between
    codes, in whole numbers; `tables`: in float32 that is looked up. `moves`: whether its nodes move codes, or pick some
    of them. `why_float`: why it has neither.
    """

    nodes: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    moves: bool = False
    why_float: str = ""


_NO_KERNEL = "ONNX Runtime has no integer kernel of it"


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
"""Name of an operator -> what it is in a file."""

EXACT_KERNELS = {kernel for form in ONNX_FORMS.values() for kernel in form.kernels}
"""Operators of ONNX Runtime that the integer reference reproduces: any difference counts."""

TABLE_KERNELS = {"QLinearSoftmax", "QLinearWhere", *(kernel for form in ONNX_FORMS.values() for kernel in form.tables)}
"""Operators that look float32 results of their own up in tables: one step is allowed."""

MOVERS = {node for form in ONNX_FORMS.values() if form.moves for node in form.nodes}
"""Operators that move codes, or pick some of them: as exact as what they read."""

REORDERING = MOVERS - {"Concat", "Pad", "Resize", "Clip", "Relu"}
"""Operators that give the same before and behind a DequantizeLinear, whatever their settings."""

LOOKED_THROUGH = MOVERS - {"Concat"}
"""What ONNX Runtime moves codes through, or drops where the codes behind it clamp as well."""

RUNTIME_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice"}
"""What ONNX Runtime moves a pair of QuantizeLinear and DequantizeLinear past by itself."""
