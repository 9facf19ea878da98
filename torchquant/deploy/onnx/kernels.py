"""Find which operator made a tensor of codes in an ONNX graph, and which tensors hold the same codes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torchquant.deploy.onnx.operators import EXACT_KERNELS, MOVERS, REORDERING
from torchquant.errors import require

SMALL = 8
"""Largest number of elements of constants that are compared by value. ONNX Runtime shares equal ones of this size."""


def kernel_of(name: str, made_by: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return the type of the node that computed a tensor of codes.

    Nodes that only move codes are passed through: back to `known` tensors, which are compared on their own, to inputs
    and to constants. Of several types, the one with the loosest bound is returned.

    made_by: tensor -> the node that makes it.
    """
    node = made_by[name]
    if node.op_type not in MOVERS:
        return str(node.op_type)
    sources = node.input if node.op_type == "Concat" else node.input[:1]
    made = [kernel_of(source, made_by, known) for source in sources if source in made_by and source not in known]
    return next((kernel for kernel in made if kernel not in EXACT_KERNELS | MOVERS), str(node.op_type))


class Contents:
    """Numbers tensors so that equal ones have the same number, in one graph and in another made from it.

    Equal means computed in the same way from the same inputs. Dequantized numbers that are then moved count as moved
    codes; a QuantizeLinear with the same scale and zero point gives back these codes.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._scalars: set[int] = set()
        self._on_grids: dict[int, tuple[int, tuple[int, ...]]] = {}  # real numbers -> their codes, scale and zero point

    def of_graph(self, proto: Any, known: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return tensor -> its number. `known`: tensors that equal tensors of another graph."""
        to_array = require("onnx", "deploy").numpy_helper.to_array
        found: dict[str, int] = {}
        for entry in proto.graph.initializer:
            is_small = prod(entry.dims) <= SMALL
            found[entry.name] = self._number(
                *(("constant", entry.data_type, *entry.dims, to_array(entry).tobytes()) if is_small else (entry.name,))
            )
            if prod(entry.dims) == 1:
                self._scalars.add(found[entry.name])
        for node in proto.graph.node:
            inputs = tuple(found.setdefault(name, self._number(name)) for name in node.input)
            attributes = tuple(sorted(entry.SerializeToString() for entry in node.attribute))
            for i, name in enumerate(node.output):
                number = self._output((node.op_type, i, attributes), inputs)
                found[name] = number if known is None else known.get(name, number)
        return found

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _output(self, operator: tuple[str, int, Any], inputs: tuple[int, ...]) -> int:
        kind, first = operator[0], inputs[0] if inputs else -1
        codes, grid = self._on_grids.get(first, (first, None))
        if kind == "DequantizeLinear" and inputs[1] in self._scalars:
            return self._on_grid(first, inputs[1:])
        if kind == "QuantizeLinear" and grid == inputs[1:]:
            return codes
        if kind in REORDERING and grid is not None:
            return self._on_grid(self._number(operator, (codes, *inputs[1:])), grid)
        return self._number(operator, inputs)

    def _on_grid(self, codes: int, grid: tuple[int, ...]) -> int:
        real = self._number("DequantizeLinear", codes, grid)
        self._on_grids[real] = codes, grid
        return real
