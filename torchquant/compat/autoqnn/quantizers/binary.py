"""AutoQNN's Binary."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import BinaryQuantizer


class Binary(Scheme, BinaryQuantizer, Quantization):
    """Signs of weights times their mean magnitude, always 1 bit."""

    spec = "xnor"
    published_bits = fixed_bits = 1


class BinaryAct(Activation, Binary):
    """Signs of activations times their averaged mean magnitude."""
