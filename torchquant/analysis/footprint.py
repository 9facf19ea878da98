"""Count the bytes of the weights of a model, at their true width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.graph.cost import agree, stored_bytes
from torchquant.qmodule import QModule
from torchquant.qmodule.weights import float_weights
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.formats import FLOAT_BYTES
from torchquant.utils import qmodules


@dataclass(frozen=True)
class WeightBytes:
    """The bytes of one weight: packed codes (or float32 elements), and the numbers needed to decode them."""

    path: str
    n_bits: int
    codes: int
    parameters: int

    @property
    def total(self) -> int:
        """Bytes of codes and parameters together."""
        return self.codes + self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)


@checked
def weight_bytes(model: nn.Module) -> list[WeightBytes]:
    """Count the bytes of every layer weight of the model, in any state. Biases are not counted.

    Codes are packed at their true width, rounded up to whole bytes per weight. Parameters are 4 bytes per
    scale (a step, an alpha), and `ceil(n_bits / 8)` bytes per zero point if any is not 0. A weight
    without quantizer takes 4 bytes per element, so a float model can be counted too. A weight that several layers share
    takes 0 bytes if it was already counted under a quantizer with the same numbers.
    Raises UnobservedRangeError before calibration.

    >>> [site.total for site in weight_bytes(nn.Linear(10, 4))]
    [160]
    """
    found: list[WeightBytes] = []
    stored: dict[int, list[Quantizer | None]] = {}
    for path, weight, quantizer in list(_weights(model)):
        others = stored.setdefault(id(weight), [])
        again = any(agree(quantizer, other) for other in others)
        others.append(quantizer)
        found.append(_site_bytes(path, weight, quantizer, again))
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Quantizer | None]]:
    slots = {module: module.weight_slots() for _, module in qmodules(model)}
    wrapped: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, QModule):
            wrapped |= {id(part) for part in module.modules()} if slots[module] else set()
            for slot in slots[module]:
                yield slot.label, slot.weight, slot.quantizer
        elif id(module) not in wrapped:
            found = float_weights(module)
            for name, (weight, _) in found.items():
                yield (path if len(found) == 1 else f"{path}.{name}".strip(".")) or "(root)", weight, None


def _site_bytes(path: str, weight: Tensor, quantizer: Quantizer | None, again: bool) -> WeightBytes:
    n_bits = 8 * FLOAT_BYTES if quantizer is None else quantizer.n_bits
    return WeightBytes(path, n_bits, *((0, 0) if again else stored_bytes(weight, quantizer)))
