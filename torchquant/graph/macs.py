"""Count multiply-adds of layers, of operators, and of functions that a forward calls directly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from torchquant.graph.called import tensors_in
from torchquant.graph.operators import OPERATORS
from torchquant.graph.sites import Site
from torchquant.qmodule.patterns import LayerPattern, read_quietly, row_of, stock_type
from torchquant.qmodule.weights import float_weights


@dataclass(frozen=True)
class Macs:
    """Multiply-adds by the kind of their operands.

    `read`: a weight and an input of the site, or two inputs; `inner`: a weight and a value that a module with several
    weights computes inside; `floats`: two such values.
    """

    read: int = 0
    inner: int = 0
    floats: int = 0

    @property
    def total(self) -> int:
        """The sum of all multiply-adds."""
        return self.read + self.inner + self.floats

    @classmethod
    def of_one(cls, samples: int, calls: Iterable[Macs]) -> Macs:
        """Add several calls, divided by the number of samples."""
        every = list(calls)
        return cls(*(-(-sum(getattr(macs, f.name) for macs in every) // samples) for f in fields(cls)))


def site_macs(site: Site, arguments: Sequence[Any], output: Any) -> Macs:
    """Count the multiply-adds of one call; elementwise operators, pooling and concatenation count none.

    arguments: positional, then keyword.
    """
    results, inputs = list(tensors_in(output)), list(tensors_in(arguments))
    if not results or not inputs:
        return Macs()
    out, module = results[0], site.module
    if module is not None and site.is_layer:
        with read_quietly(module):
            return layer_macs(module, inputs, out)
    operator = OPERATORS.get(site.types[0])
    return Macs(operator.macs(arguments, out) if operator is not None and operator.macs is not None else 0)


def function_macs(function: Any, arguments: Sequence[Any], output: Any) -> int:
    """Count the multiply-adds of one call of a torch function; 0 for one that multiplies no matrices."""
    operator = OPERATORS.of(function)
    if operator is None or operator.macs is None or not isinstance(output, Tensor):
        return 0
    return operator.macs(arguments, output)


def layer_macs(module: Any, inputs: list[Tensor], out: Tensor) -> Macs:
    """Count the multiply-adds of one call of a layer."""
    x, kind = inputs[0], stock_type(module)
    row = row_of(module)
    if isinstance(row, LayerPattern):
        return Macs((x if row.transposed else out).numel() * module.weight[0].numel())
    if kind is nn.Bilinear:
        return Macs(out.numel() * module.weight[0].numel())
    if kind in (nn.Embedding, nn.EmbeddingBag):
        return Macs()
    if kind is nn.MultiheadAttention:
        key = inputs[1] if len(inputs) > 1 else x
        tokens, keys = x.numel() // x.shape[-1], key.numel() // key.shape[-1]
        length = key.shape[1 if module.batch_first and key.ndim == 3 else 0]
        width = module.embed_dim
        projected = tokens * width * width + keys * width * (module.kdim + module.vdim)
        return Macs(projected, tokens * width * width, 2 * tokens * length * width)
    weights = {name: weight.numel() for name, (weight, _) in float_weights(module).items()}
    steps = x.numel() // x.shape[-1]
    first = sum(n for name, n in weights.items() if name.removesuffix("_reverse") in ("weight_ih", "weight_ih_l0"))
    return Macs(first * steps, (sum(weights.values()) - first) * steps)
