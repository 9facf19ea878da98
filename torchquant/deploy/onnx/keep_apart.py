"""Keep ONNX Runtime from merging two consecutive pairs of quantizers on different grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchquant.deploy.onnx.operators import LOOKED_THROUGH
from torchquant.errors import require

LOWEST = "lowest_float"


def keep_apart(proto: Any) -> None:
    """Put a Max with the lowest float before each QuantizeLinear that reads numbers on another grid, in place.

    ONNX Runtime's `DoubleQDQPairsRemover` gives two consecutive pairs one new grid, the overlap of both. The Max
    changes no number, and the optimizer does not look through it.
    """
    onnx = require("onnx", "deploy")
    stored = {entry.name: entry for entry in proto.graph.initializer}
    made_by = {name: node for node in proto.graph.node for name in node.output}

    def grid(node: Any) -> list[Any]:
        """Return scale and zero point as numbers."""
        held = [onnx.numpy_helper.to_array(stored[name]) for name in node.input[1:]]
        return [(array.dtype, array.tolist()) for array in held]

    nodes = []
    for node in proto.graph.node:
        source = _source(node, made_by) if node.op_type == "QuantizeLinear" else None
        if source is not None and source.op_type == "DequantizeLinear" and grid(source) != grid(node):
            between = f"{node.output[0]}.before"
            nodes.append(onnx.helper.make_node("Max", [node.input[0], LOWEST], [between]))
            node.input[0] = between
        nodes.append(node)
    if len(nodes) > len(proto.graph.node):
        lowest = onnx.helper.make_tensor(LOWEST, onnx.TensorProto.FLOAT, [], [torch.finfo(torch.float32).min])
        proto.graph.initializer.append(lowest)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)


def _source(node: Any, made_by: Mapping[str, Any]) -> Any:
    """Find the node whose values a node reads, through nodes that move or clamp; None for an input or a constant."""
    source = made_by.get(node.input[0])
    while source is not None and source.op_type in LOOKED_THROUGH:
        source = made_by.get(source.input[0])
    return source
