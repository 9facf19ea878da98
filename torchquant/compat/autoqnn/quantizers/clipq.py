"""AutoQNN's ClipQ."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import ClipQQuantizer


class ClipQ(Scheme, ClipQQuantizer, Quantization):
    """Mid-rise around 0, Gaussian step, clipped gradient."""

    spec = "clipq:{n}"


class ClipQAct(Activation, ClipQ):
    """ClipQ for activations."""
