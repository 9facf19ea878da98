"""Keeping ONNX Runtime from rewriting a file into one that computes other numbers.

Its `DoubleQDQPairsRemover` makes one pair of two that follow each other, on a grid of its own, and its
`WeightBiasQuantization` quantizes the float weight of a layer that stands between a DequantizeLinear and a
QuantizeLinear, to 8 bits per tensor. Both happen also where the neighbours move values or are clamps that the codes
take over, since it moves and drops such nodes. A Max with the lowest float stands between them, which changes no number
and which it does not look through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchquant.deploy.kernels import MOVERS
from torchquant.errors import require

LOOKED_THROUGH = (MOVERS - {"Concat"}) | {"Relu"}
WEIGHTED = {"Conv", "ConvTranspose", "Gemm"}
LOWEST = "lowest_float"


def keep_apart(proto: Any) -> None:
    """Put a Max before each QuantizeLinear that would be rewritten, in place."""
    onnx = require("onnx", "deploy")
    stored = {entry.name: entry for entry in proto.graph.initializer}
    made_by = {name: node for node in proto.graph.node for name in node.output}

    def grid(node: Any) -> list[Any]:
        """Scale and zero point, as numbers."""
        held = [onnx.numpy_helper.to_array(stored[name]) for name in node.input[1:]]
        return [(array.dtype, array.tolist()) for array in held]

    nodes, apart = [], False
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in made_by:
            source = _source(made_by[node.input[0]], made_by)
            follows_another = source.op_type == "DequantizeLinear" and grid(source) != grid(node)
            if follows_another or _is_float_layer(source, stored, made_by):
                between = f"{node.output[0]}.before"
                nodes.append(onnx.helper.make_node("Max", [node.input[0], LOWEST], [between]))
                node.input[0], apart = between, True
        nodes.append(node)
    if apart:
        lowest = onnx.helper.make_tensor(LOWEST, onnx.TensorProto.FLOAT, [], [torch.finfo(torch.float32).min])
        proto.graph.initializer.append(lowest)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)


def _source(node: Any, made_by: Mapping[str, Any]) -> Any:
    """The node whose values come here, behind all that moves or clamps them."""
    while node.op_type in LOOKED_THROUGH and node.input[0] in made_by:
        node = made_by[node.input[0]]
    return node


def _is_float_layer(node: Any, stored: Mapping[str, Any], made_by: Mapping[str, Any]) -> bool:
    """Whether a layer reads numbers on a grid and has a float weight."""
    if node.op_type not in WEIGHTED or node.input[1] not in stored or node.input[0] not in made_by:
        return False
    return bool(_source(made_by[node.input[0]], made_by).op_type == "DequantizeLinear")
