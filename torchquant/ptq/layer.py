"""An algorithm's view of one layer: its weight as a matrix, its grid, and statistics of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.ptq.functional.gram import (
    check_gram,
    conv_rows,
    gram_sum,
    linear_rows,
    output_error,
    transposed_conv_rows,
)
from torchquant.ptq.functional.mismatch import corrected_weight
from torchquant.qmodule import QWrapper, WeightSlot
from torchquant.qmodule.own_forward import read_of_product
from torchquant.qmodule.patterns import InputFirstPattern
from torchquant.quantizers import Quantizer


class Layer:
    """A quantized weight. Algorithms read it; only the engine changes it.

    `weight`: (groups, rows, K) float32 or wider, the real weight that QUANT_EVAL quantizes, a batch norm folded in.
    `rounded`: the same on its grid, once an algorithm has chosen; None before. `path`: its name in messages.
    """

    def __init__(self, slot: WeightSlot, real: Tensor, rounded: Tensor | None = None) -> None:
        assert slot.quantizer is not None
        self.slot, self.path = slot, slot.label
        self.quantizer: Quantizer = slot.quantizer
        self.shape = slot.seen().shape
        self.weight = real.detach().to(torch.promote_types(real.dtype, torch.float32))
        self.rounded = rounded

    def nearest(self, x: Tensor, columns: Tensor) -> Tensor:
        """Quantize x, (groups, rows, k), on the grids of these columns, (groups, k) int64."""
        if len(x) == 1 or not self.quantizer.levels_vary or bool((columns == columns[:1]).all()):
            return self.quantizer.nearest(x.flatten(0, 1), columns[0]).view(x.shape)
        every = [self.quantizer.nearest(x.flatten(0, 1), own).view(x.shape)[i] for i, own in enumerate(columns)]
        return torch.stack(every)

    def quantized(self, weight: Tensor | None = None) -> Tensor:
        """Round a weight, by default the layer's own, to nearest: (groups, rows, K)."""
        weight = self.weight if weight is None else weight
        return self.quantizer(weight.reshape(self.shape)).detach().view(weight.shape)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels below and above each weight: two (groups, rows, K)."""
        below, above = self.quantizer.neighbours(weight.reshape(self.shape))
        return below.view(weight.shape), above.view(weight.shape)


@dataclass
class LayerData:
    """Statistics of a layer's inputs over all batches; only those that the stages asked for are present.

    `n`: the number of rows, that is tokens or patches. All statistics are means over the rows: `gram` (groups, K, K)
    of the current inputs, `cross_gram` (groups, K, K) of these, transposed, with the inputs in the float model;
    `mean_input` and `mean_float_input` (groups, K). `generator`: for random numbers.
    """

    path: str
    wanted: frozenset[str]
    generator: torch.Generator
    n: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _means: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _corrected: tuple[Tensor, float, Tensor] | None = field(default=None, repr=False)

    def add(self, rows: Tensor, float_rows: Tensor | None) -> None:
        """Add a block of rows, (groups, n, K), of both models."""
        self.n += rows.shape[1]
        self._means.clear()
        self._corrected = None
        found = {"gram": lambda: gram_sum(rows), "means": lambda: rows.to(torch.float64).sum(1)}
        if float_rows is not None:
            found["cross_gram"] = lambda: gram_sum(rows, float_rows)
            found["float_means"] = lambda: float_rows.to(torch.float64).sum(1)
        for name in self.wanted & found.keys():
            value = found[name]()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _mean(self, name: str) -> Tensor:
        if name not in self.wanted:
            raise ConfigError(f"{self.path}: the algorithm asks for {name!r}, which is not among what it needs")
        if name not in self._sums:
            raise ConfigError(f"{self.path}: no calibration batch reached this layer; give batches that do")
        if name not in self._means:
            self._means[name] = self._sums[name] / self.n
        return self._means[name]

    @property
    def gram(self) -> Tensor:
        return self._mean("gram")

    @property
    def cross_gram(self) -> Tensor:
        return self._mean("cross_gram")

    @property
    def mean_input(self) -> Tensor:
        return self._mean("means")

    @property
    def mean_float_input(self) -> Tensor:
        return self._mean("float_means")

    def check(self, damp: float) -> None:
        """Raise for a Gram matrix that carries no information about the layer."""
        check_gram(self.gram, self.n, damp)

    def corrected(self, weight: Tensor, damp: float = 0.01) -> Tensor:
        """Solve for the weight whose outputs on the current inputs are nearest to the float ones: (groups, rows, K)."""
        if self._corrected is None or self._corrected[0] is not weight or self._corrected[1] != damp:
            self._corrected = (weight, damp, corrected_weight(weight, self.gram, self.cross_gram, damp))
        return self._corrected[2]

    def error(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Compute the mean squared error of each output under a rounded weight: (groups, rows)."""
        return output_error((weight - rounded).to(torch.float64), self.gram)


def rows_read(wrapper: QWrapper, x: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the input rows of the product in a wrapped layer when it is called with x, in blocks (groups, n, K).

    keep: (...) bool, true for the tokens that count.
    """
    x = wrapper.quantized_input(x)
    if isinstance(wrapper.row, InputFirstPattern):
        yield linear_rows(x, keep)
        return
    function, x, geometry = read_of_product(lambda: wrapper.layer.forward(x))
    if function.__name__ == "linear":
        yield linear_rows(x, keep)
        return
    kernel = wrapper.weight_slots()[0].seen().shape[2:]
    batch = x if x.ndim == len(kernel) + 2 else x[None]
    rows = transposed_conv_rows if "transpose" in function.__name__ else conv_rows
    yield from rows(batch, kernel, **geometry)


def make_rows(
    wrapper: QWrapper, x: Any, real: Any, float_x: Any, keep: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield rows of the quantized and the float layer in pairs; None if there is no float layer."""
    if real is None:
        for piece in rows_read(wrapper, x, keep):
            yield piece, None
        return
    yield from zip(rows_read(wrapper, x, keep), rows_read(real, float_x, keep), strict=True)
