"""Bytes that the weights of a model take, at their true width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.graph.cost import stored_bytes
from torchquant.qmodule import LayerRow, QModule
from torchquant.qmodule.patterns import row_of
from torchquant.quantizers import Quantizer
from torchquant.quantizers._base import FLOAT_BYTES


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of one weight: packed codes (or float32 elements), and the numbers needed to decode them."""

    path: str
    n_bits: int
    codes: int
    parameters: int

    @property
    def total(self) -> int:
        """Codes and parameters."""
        return self.codes + self.parameters

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@checked
def weight_bytes(model: nn.Module) -> list[WeightBytes]:
    """Bytes of every layer weight of the model, whatever state it is in. Biases are not counted.

    Codes are packed at their true width, rounded up to whole bytes a weight. Parameters are 4 bytes a
    scale (a step, an alpha) and `ceil(n_bits / 8)` bytes a zero point where one is not 0. A weight
    without quantizer takes 4 bytes an element, so a float model can be counted too.
    Raises UnobservedRangeError before calibration.

    >>> [site.total for site in weight_bytes(nn.Linear(10, 4))]
    [160]
    """
    return [_site_bytes(path, weight, quantizer) for path, weight, quantizer in _weights(model)]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Quantizer | None]]:
    wrapped: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, QModule):
            found = module.weights()
            wrapped |= {id(part) for part in module.modules()} if found else set()
            for name, weight, quantizer in found:
                yield path + ("" if len(found) == 1 else f".{name}") or "(root)", weight, quantizer
        elif isinstance(row_of(module), LayerRow) and id(module) not in wrapped:
            yield path or "(root)", module.weight, None


def _site_bytes(path: str, weight: Tensor, quantizer: Quantizer | None) -> WeightBytes:
    n_bits = 8 * FLOAT_BYTES if quantizer is None else quantizer.n_bits
    return WeightBytes(path, n_bits, *stored_bytes(weight, quantizer))
