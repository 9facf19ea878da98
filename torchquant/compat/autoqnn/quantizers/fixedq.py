"""AutoQNN's fixed point."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import QfmtQuantizer


class FixedQuant(Scheme, QfmtQuantizer, Quantization):
    """Signed fixed point for weights: Q-format.

    >>> FixedQuant(bitwidth=4).n_bits
    4
    """

    spec = "qfmt:{n},signed=true"
    average = ",observer=ema"


class FixedQuantAct(Activation, FixedQuant):
    """Signed fixed point for activations: Q-format over an averaged range."""
