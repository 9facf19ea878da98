"""Compute products whose first operand has a scale per token on integers, in an exported graph.

ONNX Runtime has an integer kernel for such a product only if the file contains it. For float operators it would
quantize the first operand once more, in its own blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def multiply_tokens_in_integers(proto: Any, onnx: Any, zero_points: Mapping[str, int]) -> None:
    """Write MatMulInteger, and the scales behind it, for the products of tokens and stored weights, in place.

    zero_points: name of the codes of tokens -> their zero point. The nodes that turned the codes into real numbers are
    removed if nothing else reads them.
    """
    graph = _Graph(proto, onnx, zero_points)
    nodes = [new for node in proto.graph.node for new in graph.in_integers(node)]
    needed = {entry.name for entry in proto.graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(kept))


class _Graph:
    def __init__(self, proto: Any, onnx: Any, zero_points: Mapping[str, int]) -> None:
        self.proto, self.onnx, self.zero_points = proto, onnx, zero_points
        self.made_by = {name: node for node in proto.graph.node for name in node.output}
        self.stored = {entry.name: entry for entry in proto.graph.initializer}

    def in_integers(self, node: Any) -> list[Any]:
        """Return the nodes that replace a product of tokens and a stored weight; any other node unchanged."""
        tokens = self._tokens(node.input[0]) if node.op_type in ("MatMul", "Gemm") else None
        weight, is_turned = self._weight(node) if tokens is not None else (None, False)
        if tokens is None or weight is None:
            return [node]
        make, name = self.onnx.helper.make_node, node.output[0]
        codes, token_scale = tokens
        weight_codes, scale, *zero_point = weight.input
        nodes = []
        if is_turned:
            nodes.append(make("Transpose", [weight_codes], [f"{name}.weight"], perm=[1, 0]))
            weight_codes = f"{name}.weight"
        factors = [codes, weight_codes, self._zero_point(codes), *(self._own(z, f"{name}.offset") for z in zero_point)]
        bias = list(node.input[2:]) if node.op_type == "Gemm" else []
        real = f"{name}.product" if bias else name
        nodes += [
            make("MatMulInteger", factors, [f"{name}.sums"]),
            make("Cast", [f"{name}.sums"], [f"{name}.real"], to=self.onnx.TensorProto.FLOAT),
            make("Mul", [f"{name}.real", token_scale], [f"{name}.of_tokens"]),
            make("Mul", [f"{name}.of_tokens", scale], [real]),
            *[make("Add", [real, each], [name]) for each in bias],
        ]
        for new in nodes:
            new.metadata_props.extend(node.metadata_props)
        return nodes

    def _tokens(self, name: str) -> tuple[str, str] | None:
        """Find (codes, scales) of a dequantized value of tokens: the product of a Cast or Sub with the scale."""
        product = self.made_by.get(name)
        if product is None or product.op_type != "Mul":
            return None
        steps = self.made_by.get(product.input[0])
        if steps is not None and steps.op_type == "Sub":
            steps = self.made_by.get(steps.input[0])
        if steps is None or steps.op_type != "Cast" or steps.input[0] not in self.zero_points:
            return None
        return steps.input[0], product.input[1]

    def _weight(self, node: Any) -> tuple[Any, bool]:
        """Find the DequantizeLinear of a stored weight, or None, and whether its codes are (out, in)."""
        settings = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        is_turned = bool(settings.pop("transB", 0))
        if any(value not in (0, 1, 1.0) for value in settings.values()) or settings.get("transA"):
            return None, False
        source = self.made_by.get(node.input[1])
        if source is not None and source.op_type == "Transpose":
            source, is_turned = self.made_by.get(source.input[0]), not is_turned
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in self.stored:
            return None, False
        scale, axis = self.stored.get(source.input[1]), next((a.i for a in source.attribute if a.name == "axis"), 1)
        is_matrix = len(self.stored[source.input[0]].dims) == 2
        per_output = scale is not None and (not scale.dims or axis == (0 if is_turned else 1))
        return (source, is_turned) if is_matrix and per_output else (None, False)

    def _own(self, zero_point: str, name: str) -> str:
        """Copy an initializer, so that ONNX Runtime's precise mode can convert it to uint8 with this weight alone."""
        entry = self.proto.graph.initializer.add()
        entry.CopyFrom(self.stored[zero_point])
        entry.name = name
        return name

    def _zero_point(self, codes: str) -> str:
        """Add an initializer with the zero point of codes of tokens."""
        name = f"{codes.removesuffix('.codes')}.zero_point"
        if name not in self.stored:
            kind = np.uint8 if self.zero_points[codes] else np.int8
            entry = self.onnx.numpy_helper.from_array(np.array(self.zero_points[codes], kind), name)
            self.proto.graph.initializer.append(entry)
            self.stored[name] = entry
        return name
