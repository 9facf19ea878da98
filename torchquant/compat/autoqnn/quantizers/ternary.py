"""AutoQNN's Ternary."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import TernaryQuantizer


class Ternary(Scheme, TernaryQuantizer, Quantization):
    """The quantizer of ternary weight networks, always 2 bits."""

    spec = "twn"
    published_bits = fixed_bits = 2


class TernaryAct(Activation, Ternary):
    """Ternary for activations."""
