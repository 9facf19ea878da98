"""AutoQNN's PotQ."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import PotQuantizer


class PotQ(Scheme, PotQuantizer, Quantization):
    """Powers of two, 1 to 5 bits; AutoQNN has 4 for every larger width."""

    spec = "pot:{n}"
    published_bits = 4
    widest = 5


class PotQAct(Activation, PotQ):
    """PotQ for activations."""
