"""Write float layers between codes so that ONNX Runtime does not quantize their weights on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.deploy.onnx.operators import RUNTIME_MOVES

WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}
"""Operator whose constant weight ONNX Runtime quantizes -> the output axis of the weight."""
FOLLOWING = RUNTIME_MOVES | {"Flatten", "Identity", "Dropout", "Relu", "Clip", "BatchNormalization", "Add", "Mul"}
"""Operators that may follow such an operator before its result becomes codes: ONNX Runtime fuses or moves them."""
MANTISSA_BITS, LEAST_EXPONENT = 24, -126


def keep_float_weights(proto: Any, onnx: Any) -> None:
    """Write the bias of each float layer whose result becomes codes as 32-bit codes that stand for the same numbers.

    Between a DequantizeLinear and a QuantizeLinear ONNX Runtime (`WeightBiasQuantization`, since 1.21) quantizes a
    float weight to 8 bits per tensor, unless the layer has a bias that is not a constant of the file. Each bias is an
    integer of at most 24 bits times a power of two, which DequantizeLinear multiplies without rounding.
    """
    stored = {entry.name: entry for entry in proto.graph.initializer}
    made_by = {out: node for node in proto.graph.node for out in node.output}
    nodes = []
    for node in proto.graph.node:
        if node.op_type in WEIGHTED and _is_float(node.input[1], stored, made_by) and _becomes_codes(proto, node):
            bias = _bias(proto, node, stored, onnx)
            if bias is not None:
                nodes.append(_dequantized(proto, node, bias, onnx))
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _is_float(name: str, stored: dict[str, Any], made_by: dict[str, Any]) -> bool:
    """Tell whether a value is a constant, or computed from constants, without a DequantizeLinear."""
    if name in stored or not name:
        return True
    node = made_by.get(name)
    return (
        node is not None
        and node.op_type != "DequantizeLinear"
        and all(_is_float(source, stored, made_by) for source in node.input)
    )


def _becomes_codes(proto: Any, node: Any) -> bool:
    """Tell whether a chain of single readers leads from the result to a QuantizeLinear."""
    while node.op_type != "QuantizeLinear":
        readers = [reader for reader in proto.graph.node if node.output[0] in reader.input]
        if len(readers) != 1 or readers[0].op_type not in (*FOLLOWING, "QuantizeLinear"):
            return False
        node = readers[0]
    return True


def _bias(proto: Any, node: Any, stored: dict[str, Any], onnx: Any) -> Tensor | None:
    """Return the bias, zeros if there is none; None if it is computed, or holds NaN or Inf."""
    name = node.input[2] if len(node.input) > 2 else ""
    if not name:
        return torch.zeros(_n_outputs(proto, node, stored))
    bias = torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy()) if name in stored else None
    return bias if bias is not None and bias.ndim == 1 and bool(bias.isfinite().all()) else None


def _n_outputs(proto: Any, node: Any, stored: dict[str, Any]) -> int:
    weight = node.input[1]
    typed = {entry.name: entry.type.tensor_type.shape.dim for entry in proto.graph.value_info}
    sizes = stored[weight].dims if weight in stored else [size.dim_value for size in typed[weight]]
    given = {attribute.name: attribute.i for attribute in node.attribute}
    axis = 0 if given.get("transB") else WEIGHTED[node.op_type]
    return int(sizes[axis]) * (given.get("group", 1) if node.op_type == "ConvTranspose" else 1)


def _dequantized(proto: Any, node: Any, bias: Tensor, onnx: Any) -> Any:
    """Make the DequantizeLinear that computes the bias, and let the node read it."""
    exponents = (torch.frexp(bias).exponent - MANTISSA_BITS).clamp_min(LEAST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(bias), exponents)
    values = {"codes": torch.round(bias / scale).to(torch.int32), "scale": scale}
    real = f"{node.output[0]}.bias"
    for part, tensor in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), f"{real}.{part}"))
    del node.input[2:]
    node.input.append(real)
    return onnx.helper.make_node("DequantizeLinear", [f"{real}.{part}" for part in values], [real], axis=0)
