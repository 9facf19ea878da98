"""AutoQNN's ResQ."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import ResidualQuantizer


class ResQ(Scheme, ResidualQuantizer, Quantization):
    """Greedy residual binary."""

    spec = "resq:{n}"


class ResQAct(Activation, ResQ):
    """ResQ for activations."""
